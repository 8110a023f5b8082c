"""Export to a GGUF file for llama.cpp and Ollama: Llama, or StableLM for LayerNorm.

llama.cpp's own converter is not used: it recognizes a tokenizer by its hash and refuses one that was trained here, and
it loses the rope base of a StableLM. Norms and the factors of the positions stay float32 in every dtype, because
llama.cpp computes with them in float32.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smollm2.config.schema import ModelConfig
from smollm2.errors import CheckpointError, ConfigError, ResourceError
from smollm2.exporting.gguf_tokenizer import Value, describe_tokenizer
from smollm2.exporting.modelfile import write_modelfile
from smollm2.exporting.source import Source, check_range, check_shape, exported_weights
from smollm2.exporting.target import gguf_name
from smollm2.model.functional import scale_frequencies
from smollm2.model.transformer import HEAD, SmolLM2
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""GGUF's name of each dtype."""

FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
"""general.file_type of each dtype."""

BLOCK_SIZE, BLOCK_BYTES = 32, 34
"""q8_0 stores 32 weights of a row as 32 bytes and one scale of two bytes."""

MOST_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""GGUF's names of the parts of a tensor's name."""


def check_source(source: Source, path: Path, dtype: str) -> int:
    """Return the bytes that the weights will take.

    Raise ConfigError without the package gguf, DataError for a tokenizer and CheckpointError for a model that llama.cpp
    cannot represent.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        what = "'gguf' needs the package gguf, which is not installed"
        raise ConfigError("format", what, "run `pip install 'smollm2-training[gguf]'`") from None
    check_shape(source, path)
    c = source.model.config
    if c.num_hidden_layers > MOST_LAYERS:
        what = f"llama.cpp loads at most {MOST_LAYERS} layers, not {c.num_hidden_layers}"
        raise CheckpointError(path, what, "export with --format huggingface")
    describe_scaling(c, path)
    describe_tokenizer(source.tokenizer, c.vocab_size)
    tensors = list_tensors(source.model)
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    if dtype == "q8_0":
        for name, tensor in matrices.items():
            if tensor.shape[1] % BLOCK_SIZE:
                what = f"q8_0 needs rows whose length is a multiple of {BLOCK_SIZE}, not {tensor.shape[1]}"
                raise CheckpointError(name, what, "export as float32, float16 or bfloat16")
    stored = torch.float32 if dtype == "q8_0" else getattr(torch, dtype)
    check_range(matrices, stored, dtype)
    per_weight = BLOCK_BYTES / BLOCK_SIZE if dtype == "q8_0" else stored.itemsize
    return sum(math.ceil(t.numel() * (per_weight if t.dim() == 2 else 4)) for t in tensors.values())


def write_gguf_folder(source: Source, folder: Path, name: str, dtype: str, io_ops: IoOps = IO_OPS) -> Path:
    """Write the GGUF file and Ollama's Modelfile to an existing folder, and return the path of the former."""
    path = folder / gguf_name(name, dtype)
    fields = describe_source(source, name, dtype)
    write_gguf(path, fields, list_tensors(source.model), dtype)
    text = write_modelfile(path.name, source.tokenizer, source.model.config.max_position_embeddings)
    write_atomically(folder / "Modelfile", text.encode(), io_ops=io_ops)
    return path


def write_gguf(path: Path, fields: Mapping[str, Value], tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Write a GGUF file, one tensor after another. Raise ResourceError if this fails; see `write_shard`."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    from gguf.quants import quantize

    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer: Any = GGUFWriter(path, str(fields["general.architecture"]))
    for key, value in fields.items():
        if key != "general.architecture":  # the writer adds it
            writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])
    types = {
        name: GGMLQuantizationType[TYPES[dtype] if tensor.dim() == 2 else "F32"] for name, tensor in tensors.items()
    }
    try:
        for name, tensor in tensors.items():
            data = quantize(tensor[:1].float().numpy(), types[name])
            shape = (*tensor.shape[:1], *data.shape[1:])
            writer.add_tensor_info(name, shape, data.dtype, data[:1].nbytes * tensor.shape[0], types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), types[name]))
        writer.close()
    except OSError as error:
        what = f"the weights cannot be written ({error.strerror or error})"
        raise ResourceError(path, what, "free some space or choose another disk") from None


def architecture(config: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture."""
    return "llama" if config.norm == "rmsnorm" else "stablelm"


def describe_source(source: Source, name: str, dtype: str) -> dict[str, Value]:
    """Return the keys of the GGUF file with their values."""
    c = source.model.config
    arch = architecture(c)
    epsilon = "layer_norm_rms_epsilon" if arch == "llama" else "layer_norm_epsilon"
    shape: dict[str, Value] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        f"attention.{epsilon}": c.norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
        "vocab_size": c.vocab_size,
    }
    if c.num_attention_heads * c.head_dim != c.hidden_size:
        shape |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if arch == "stablelm":  # llama.cpp's converter takes a missing value for true
        shape["use_parallel_residual"] = False
    quantized: dict[str, Value] = {"general.quantization_version": 2} if dtype == "q8_0" else {}
    return {
        "general.architecture": arch,
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        **quantized,
        **{f"{arch}.{key}": value for key, value in shape.items()},
        **describe_tokenizer(source.tokenizer, c.vocab_size),
    }


def list_tensors(model: SmolLM2) -> dict[str, Tensor]:
    """Return the weights by GGUF's names, with the rows of q and k in the order that llama.cpp expects."""
    c = model.config
    weights = exported_weights(model)
    if architecture(c) == "stablelm":  # llama.cpp requires its head even if it is tied
        weights[HEAD] = model.lm_head.weight.detach()
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads} if architecture(c) == "llama" else {}
    tensors = {}
    for name, tensor in weights.items():
        part = name.split(".")[-2]
        tensors[rename(name)] = interleave(tensor, heads[part]) if part in heads else tensor
    factors = describe_scaling(c, Path(model.__class__.__name__))
    return tensors if factors is None else {**tensors, "rope_freqs.weight": factors}


def rename(name: str) -> str:
    """Return GGUF's name of a parameter."""
    for part, short in NAMES.items():
        name = f".{name}".replace(f".{part}.", f".{short}.")[1:]
    return name


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Return the rows (heads x D) of a projection in the order for llama.cpp's rotation, which turns neighbours together.

    Hugging Face's turns row i of a head with row i + D / 2.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def describe_scaling(config: ModelConfig, path: Path) -> Tensor | None:
    """Return the divisors (D / 2,) of the rotary frequencies by Llama 3's scaling, or None without one.

    Raise CheckpointError for an architecture whose positions llama.cpp does not scale.
    """
    if not config.rope_scaling:
        return None
    if architecture(config) != "llama":
        what = f"llama.cpp does not scale the positions of {architecture(config)}, as model.rope_scaling does"
        raise CheckpointError(path, what, "export with --format huggingface")
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_theta ** (even / config.head_dim))
    return frequencies / scale_frequencies(frequencies, config.rope_scaling)
