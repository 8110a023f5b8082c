"""Open a trained model: a `.pt` of ours, a run folder, or a Hugging Face folder (Llama, or StableLM for LayerNorm).

The parameter names are Hugging Face's, so that a folder is read as it is. What the config of a folder asks for and this
model does not compute is refused by name, never ignored.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smollm2.checkpoint.discovery import describe_missing, find_resumable, load_checkpoint
from smollm2.config.schema import Config, ModelConfig
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text
from smollm2.errors import CheckpointError
from smollm2.model.transformer import SmolLM2


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[SmolLM2, Tokenizer]:
    """The model, in evaluation mode and float32, and its tokenizer: of a `.pt`, of a run folder's newest valid checkpoint
    or of a Hugging Face folder. Raises CheckpointError or DataError."""
    model, tokenizer, _ = load_source(Path(path))
    return model.to(device), tokenizer


def load_source(
    path: Path, *, best: bool = False, say: Callable[[str], None] = lambda message: None
) -> tuple[SmolLM2, Tokenizer, Mapping[str, Any] | None]:
    """As `load_model` on the CPU, and the checkpoint's content, which a Hugging Face folder has not.

    With `best` a run folder's checkpoint with the lowest validation loss. `say` hears of checkpoints that are passed over.
    """
    if best:
        path = path / read_best_name(path)
    if (path / "config.json").exists():
        return load_hugging_face_model(path).eval(), load_tokenizer(str(path)), None
    if path.is_dir():
        found = find_resumable(path, say)
        if found is None:
            raise CheckpointError(f"{describe_missing(path)}; a model folder would hold config.json")
        path, state = found
    else:
        state = load_checkpoint(path)
    return *restore_model(state, path), state


def restore_model(state: Mapping[str, Any], path: Path) -> tuple[SmolLM2, Tokenizer]:
    """The model, in evaluation mode and float32, and the tokenizer of a checkpoint's content. Raises CheckpointError."""
    model = build_model(read_config(state, path).model, state["model"], path)
    tokenizer = state["tokenizer"]
    return model.eval(), tokenizer_from_text(tokenizer["text"], tokenizer["end_of_text"])


def read_config(state: Mapping[str, Any], path: Path) -> Config:
    """The config of the run that made a checkpoint. Raises CheckpointError where this version does not understand it."""
    try:
        return Config.model_validate_json(state["config"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: its config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


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


def load_hugging_face_model(folder: Path) -> SmolLM2:
    """The model of a folder with config.json and model.safetensors, in one file or in shards with an index."""
    config = read_hugging_face_config(folder)
    weights = read_weights(folder)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    return build_model(config, weights, folder)


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


REQUIRED_VALUES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    "stablelm": {
        "use_qkv_bias": False,
        "hidden_act": "silu",
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
}
"""Per model_type: what a config may say, where it says it; anything else is another function."""


def read_hugging_face_config(folder: Path) -> ModelConfig:
    """config.json as ours. transformers 4 keeps rope_theta at top level, 5 inside rope_parameters; both are read.

    Raises CheckpointError for another architecture, or a setting that this model does not compute.
    """
    path = folder / "config.json"
    found = read_json(path)
    kind = found.get("model_type")
    if kind not in REQUIRED_VALUES:
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported; llama and stablelm are")
    for name, value in REQUIRED_VALUES[kind].items():
        if found.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} {found[name]!r} is not supported; {value!r} is")
    try:
        return ModelConfig(
            **{name: found[name] for name in SHARED_NAMES if found.get(name) is not None},
            rope_theta=read_rope_theta(found, path),
            norm="rmsnorm" if kind == "llama" else "layernorm",
            norm_eps=found.get("rms_norm_eps", 1e-6) if kind == "llama" else found.get("layer_norm_eps", 1e-5),
            tie_word_embeddings=found.get("tie_word_embeddings", False),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


SHARED_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
)


def read_rope_theta(found: Mapping[str, Any], path: Path) -> float:
    """The rotary base; refuses scaled and partial rotary embeddings."""
    parameters = found.get("rope_parameters") or {}
    scaling = parameters or found.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{path}: rope_type {kind!r} is not supported; default is")
    partial = parameters.get("partial_rotary_factor", found.get("partial_rotary_factor"))
    if partial is None:
        partial = 0.25 if found["model_type"] == "stablelm" else 1.0
    if partial != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor {partial!r} is not supported; 1.0 is")
    return float(parameters.get("rope_theta", found.get("rope_theta", 10000.0)))


def read_best_name(folder: Path) -> str:
    """The file that a run folder's best.json names. Raises CheckpointError."""
    path = folder / "best.json"
    if not path.exists():
        raise CheckpointError(f"{path} - there is no such file - name a run folder that has one, or leave out --best")
    name = read_json(path).get("file")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path} - it names no checkpoint of this folder - name the checkpoint yourself")
    return name
