"""Read weights from safetensors files, check them against the model, and load them into it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smollm2.config.schema import ModelConfig
from smollm2.errors import CheckpointError
from smollm2.model.transformer import SmolLM2

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

ROTARY_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Buffers that old Llama folders contain. They are computed from rope_theta, so stored ones are ignored."""

LFS_POINTER = b"version https://git-lfs"

SHOWN_PROBLEMS = 3


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> SmolLM2:
    """Return a float32 model with this config and these weights.

    Raise CheckpointError naming the weights that do not fit, have an unsupported dtype or are not finite. With tied
    embeddings, the output head may be absent, or present if it equals the embedding.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(ROTARY_BUFFERS)}
    check_dtypes(weights, path)
    if config.tie_word_embeddings and EMBEDDING in weights:
        check_tied(weights, path)
        weights[HEAD] = weights[EMBEDDING]
    with torch.device("meta"), SkipInitialization():
        model = SmolLM2(config)
    check_shapes(model.state_dict(), weights, path)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.load_state_dict({name: weights[name].float() for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        if not all(map(torch.isfinite, parameter.detach().aminmax())):  # NaN propagates to both
            raise CheckpointError(path, f"{name} contains NaN or infinite values", "use an undamaged copy")
    return model


class SkipInitialization(TorchFunctionMode):
    """Skips weight initialization, which on the meta device would import torch's compiler (as slow as torch itself)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor unchanged if `func` initializes it, else call `func`."""
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs)


def check_dtypes(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for integer and 8-bit float weights: they are quantized and useless without scales."""
    for name, tensor in weights.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(path, f"{name} has dtype {kind}: quantized weights are not supported", NOT_QUANTIZED)


NOT_QUANTIZED = "use the folder of the original model, with float32 or 16-bit weights"


def check_tied(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError if a stored output head differs from the embedding to which the config ties it."""
    head, embedding = weights.get(HEAD), weights[EMBEDDING]
    if head is None or torch.equal(head, embedding):
        return
    difference = "the shapes differ"
    if head.shape == embedding.shape:
        difference = f"the largest difference is {(head.double() - embedding.double()).abs().max().item():.2g}"
    raise CheckpointError(
        path,
        f"the config ties {HEAD} to {EMBEDDING}, but both are stored and {difference}",
        "set tie_word_embeddings to false in the config to use the stored head",
    )


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError if names or shapes differ, before anything is copied."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = ", ".join(problems[:SHOWN_PROBLEMS])
        raise CheckpointError(
            path, f"the weights do not fit the model: {listed}{more}", "use the config that belongs to these weights"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the folder's safetensors files: one file, or shards with an index.

    Raise CheckpointError if a file is missing or invalid.
    """
    index = folder / "model.safetensors.index.json"
    names = read_shard_names(index) if index.exists() else ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= read_shard(folder / name)
    return weights


def read_shard_names(index: Path) -> list[str]:
    """Return the names of the shards in an index. Raise CheckpointError if the index is invalid."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(index, "weight_map is missing or does not consist of file names", DOWNLOAD)
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(index, f"shard {name!r} is outside the folder", "use a folder that you trust")
    return names


DOWNLOAD = "download the model folder again"


def read_shard(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file. Raise CheckpointError if it is missing or invalid."""
    if not path.exists():
        other = sorted(found.name for found in path.parent.glob("pytorch_model*.bin"))
        what = f"not found; {other[0]} is not read, because opening it may run code" if other else "not found"
        raise CheckpointError(path, what, "convert the folder to safetensors" if other else DOWNLOAD)
    refuse_pointer(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"is incomplete, or is not a safetensors file ({error})", DOWNLOAD) from None


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if the file is a Git LFS pointer, a placeholder for a file that was not downloaded."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(path, "is a Git LFS pointer, not the file itself", "run git lfs pull in that folder")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise CheckpointError if it is missing or invalid."""
    try:
        refuse_pointer(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "not found", "choose a .pt file, or a folder with config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read as JSON ({error})", DOWNLOAD) from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"contains JSON of type {type(value).__name__} instead of an object", DOWNLOAD)
    return value
