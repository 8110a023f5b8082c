"""Stored tensors, checked against the model they are for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smollm2.config.schema import ModelConfig
from smollm2.errors import CheckpointError
from smollm2.model.transformer import SmolLM2


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> SmolLM2:
    """A model of this shape with these weights, in float32. Raises CheckpointError naming what does not fit, or is not finite."""
    with torch.device("meta"):
        model = SmolLM2(config)
    check_shapes(model.state_dict(), weights, path)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.load_state_dict({name: weights[name].float() for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        if not all(map(torch.isfinite, parameter.detach().aminmax())):  # NaN spreads to both
            raise CheckpointError(f"{path} - {name} holds NaN or infinite values - take a copy that is sound")
    return model


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError where names or shapes differ, before anything is copied."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: the weights do not fit the model: {', '.join(problems[:3])}{more}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} lies outside the folder")
        try:
            weights |= load_file(folder / name)
        except FileNotFoundError:
            raise CheckpointError(f"{folder / name}: not found; a model folder holds model.safetensors") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name}: cannot be read as safetensors: {error}") from None
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a model is a .pt file or a folder with config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not an object")
    return value
