"""Export to a Hugging Face folder, Llama or StableLM (for LayerNorm), that transformers 4.57 and 5 both read correctly.

Every field is written: if one is missing, transformers uses its own default (5 reads rope_theta in rope_parameters,
4.57 at the top level, and each silently ignores the other place). Files that came with the tokenizer stay as they were.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.data.tokenizer_files import GENERATION, TOKENIZER_CONFIG
from smollm2.errors import CheckpointError, ResourceError
from smollm2.exporting.source import Source, check_range, check_shape, exported_weights
from smollm2.exporting.special_tokens import find_begin_of_text
from smollm2.exporting.target import write_json
from smollm2.model.transformer import SmolLM2
from smollm2.storage.atomic import IO_OPS, IoOps

DTYPES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

SHARD_BYTES = 5 * 10**9


def check_source(source: Source, path: Path, dtype: str) -> int:
    """Return the bytes that the weights will take.

    Raise CheckpointError for a model that neither Llama nor StableLM can represent, or that transformers refuses.
    """
    check_shape(source, path)
    c = source.model.config
    if c.hidden_size % c.num_attention_heads:
        what = f"transformers 5 cannot load a model whose hidden_size ({c.hidden_size}) is not a multiple of its heads"
        raise CheckpointError(
            path, f"{what} ({c.num_attention_heads})", "train with a hidden_size that is a multiple of them"
        )
    weights = exported_weights(source.model)
    check_range(weights, DTYPES[dtype], dtype)
    return count_bytes(weights, DTYPES[dtype])


def write_model_folder(
    source: Source, folder: Path, *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES, io_ops: IoOps = IO_OPS
) -> None:
    """Write the configs, weights and tokenizer of a model to an existing folder."""
    write_json(folder / "config.json", describe_model(source.model, source.tokenizer, dtype), io_ops)
    write_weights(folder, exported_weights(source.model), DTYPES[dtype], shard_bytes, io_ops)
    source.tokenizer.save(folder)
    if GENERATION not in source.tokenizer.files:
        write_json(folder / GENERATION, describe_generation(source.tokenizer), io_ops)
    if TOKENIZER_CONFIG not in source.tokenizer.files:
        complete_tokenizer_config(folder / TOKENIZER_CONFIG, source.model.config.max_position_embeddings, io_ops)


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int, io_ops: IoOps
) -> None:
    """Write model.safetensors, or shards of up to `shard_bytes` with an index if the weights are larger."""
    shards = list(split_shards(weights, dtype, shard_bytes))
    if len(shards) == 1:
        write_shard(folder / "model.safetensors", weights, dtype)
        return
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: weights[name] for name in names}, dtype)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": count_bytes(weights, dtype)}, "weight_map": files}
    write_json(folder / "model.safetensors.index.json", index, io_ops)


def split_shards(weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the tensor names of each shard, in order; a tensor larger than `shard_bytes` gets a shard of its own."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        more = tensor.numel() * dtype.itemsize
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def write_shard(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write one safetensors file. Raise ResourceError if this fails.

    It need not be written atomically, because the whole folder is; `finish_files` syncs it. safetensors makes no copy,
    so only a conversion to 16 bits takes memory, and less than the verification takes afterwards.
    """
    try:
        save_file(
            {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}, path, {"format": "pt"}
        )
    except (OSError, SafetensorError) as error:
        what = f"the weights cannot be written ({error})"
        raise ResourceError(path, what, "free some space or choose another disk") from None


def count_bytes(weights: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Return the size in bytes of the weights when stored as `dtype`."""
    return sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize


def describe_model(model: SmolLM2, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, with every field that either version of transformers reads."""
    c = model.config
    name = str(DTYPES[dtype]).removeprefix("torch.")
    scaling: dict[str, Any] | None = {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None
    if scaling:  # transformers compares it with an integer
        scaling["original_max_position_embeddings"] = int(c.rope_scaling["original_max_position_embeddings"])
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})}
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "use_cache": True,
        "bos_token_id": find_begin_of_text(tokenizer),
        "eos_token_id": tokenizer.end_of_text,
        "pad_token_id": None,
        "dtype": name,
        "torch_dtype": name,
    }
    if c.norm == "rmsnorm":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **shared,
            "rope_parameters": rope,
            "rms_norm_eps": c.norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
        }
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        **shared,
        "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "layer_norm_eps": c.norm_eps,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "hidden_dropout": 0.0,
    }


def describe_generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of generation_config.json: without it, transformers would use its default ids, 1 and 2."""
    begin = find_begin_of_text(tokenizer)
    return {"bos_token_id": begin, "eos_token_id": tokenizer.end_of_text, "do_sample": False}


def complete_tokenizer_config(path: Path, positions: int, io_ops: IoOps) -> None:
    """Add the context length, which transformers reads, and the token that lm-eval prepends to a text."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"bos_token": config["eos_token"], "model_max_length": positions}
    write_json(path, config, io_ops)
