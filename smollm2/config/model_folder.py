"""Read the config.json of a Hugging Face model folder: Llama, or StableLM if the model uses LayerNorm.

A setting that SmolLM2 does not support is rejected by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smollm2.config.schema import ModelConfig
from smollm2.config.values import ROPE_SCALING
from smollm2.errors import CheckpointError

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "stablelm": {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
"""The defaults that transformers uses for absent or null keys, by model_type."""

REQUIRED_VALUES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    "stablelm": {
        "use_qkv_bias": False,
        "hidden_act": "silu",
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
}
"""The only supported values, which are also the defaults; any other value would define a different model."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")

NOT_QUANTIZED = "use the folder of the original model, with float32 or 16-bit weights"
DOWNLOAD = "download the model folder again"
LFS_POINTER = b"version https://git-lfs"
NO_CONFIG = "choose a .pt file, or a folder with config.json"


def read_hugging_face_config(folder: Path) -> ModelConfig:
    """Return config.json as a ModelConfig. A key that is null or absent gets transformers' default.

    Raise CheckpointError for another architecture, a quantized model, or a setting that SmolLM2 does not support.
    """
    path = folder / "config.json"
    found = {name: value for name, value in read_json(path).items() if value is not None}
    kind = found.get("model_type")
    if kind not in DEFAULTS:
        raise CheckpointError(path, f"model_type {kind!r} is not supported", f"use {' or '.join(DEFAULTS)}")
    for name in QUANTIZATION_KEYS:
        if name in found:
            raise CheckpointError(path, f"{name}: quantized models are not supported", NOT_QUANTIZED)
    for name, value in REQUIRED_VALUES[kind].items():
        if found.get(name, value) != value:
            raise CheckpointError(path, f"{name} {found[name]!r} is not supported", f"only {value!r} is supported")
    values = {**DEFAULTS[kind], **found, **read_rope({**DEFAULTS[kind], **found}, path)}
    values["norm"] = "rmsnorm" if kind == "llama" else "layernorm"
    values["norm_eps"] = values["rms_norm_eps" if kind == "llama" else "layer_norm_eps"]
    known = {name: values[name] for name in ModelConfig.model_fields if values.get(name) is not None}
    try:
        return ModelConfig(**known)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "check the file") from None


def read_rope(found: Mapping[str, Any], path: Path) -> dict[str, object]:
    """Return the base of the rotary embedding, and Llama 3's scaling if there is one.

    Raise CheckpointError if the embedding is partial, or scaled in another way. transformers 4 stores rope_theta at the
    top level, transformers 5 inside rope_parameters; both are supported.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(found.get(name, {}), dict):
            raise CheckpointError(path, f"{name} {found[name]!r} is not an object", "check the file")
    parameters = {name: value for name, value in found.get("rope_parameters", {}).items() if value is not None}
    scaling = parameters or found.get("rope_scaling", {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise CheckpointError(path, f"rope_type {kind!r} is not supported", "only 'default' and 'llama3' are supported")
    numbers: dict[str, object] = {}
    if kind == "llama3":
        if missing := [name for name in ROPE_SCALING if name not in scaling]:
            raise CheckpointError(path, f"rope_type 'llama3' needs {missing[0]}", "check the file")
        numbers = {name: scaling[name] for name in ROPE_SCALING}
    partial = parameters.get("partial_rotary_factor", found["partial_rotary_factor"])
    if partial != 1.0:
        raise CheckpointError(path, f"partial_rotary_factor {partial!r} is not supported", "only 1.0 is supported")
    return {"rope_theta": parameters.get("rope_theta", found["rope_theta"]), "rope_scaling": numbers}


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
        raise CheckpointError(path, "not found", NO_CONFIG) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read as JSON ({error})", DOWNLOAD) from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"contains JSON of type {type(value).__name__} instead of an object", DOWNLOAD)
    return value
