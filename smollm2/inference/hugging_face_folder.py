"""A model folder in Hugging Face's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from smollm2.config.schema import ModelConfig
from smollm2.errors import CheckpointError
from smollm2.inference.weights import build_model, read_json, read_weights
from smollm2.model.transformer import SmolLM2


def load_hugging_face_model(folder: Path) -> SmolLM2:
    """The model of a folder with config.json and model.safetensors, in one file or in shards with an index."""
    config = read_hugging_face_config(folder)
    weights = read_weights(folder)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    return build_model(config, weights, folder)


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
