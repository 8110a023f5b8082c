"""The contents of a GGUF file, read from the disk by the package gguf and compared with the source.

The keys are computed here a second time, from the model and the tokenizer, because the writer's own list would hide its
mistakes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.exporting.special_tokens import find_begin_of_text, find_end_of_turn, find_padding
from smollm2.model.transformer import SmolLM2

PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SWAPS = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}


def check_keys(reader: Any, model: SmolLM2, tokenizer: Tokenizer, path: Path, dtype: str) -> Iterator[str]:
    """Yield how the file's keys differ from what the source says."""
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    wanted = {
        **expected_shape(model, path, dtype),
        **{f"tokenizer.ggml.{key}": value for key, value in expected_tokenizer(model, tokenizer).items()},
    }
    if tokenizer.chat_template is not None:
        wanted["tokenizer.chat_template"] = tokenizer.chat_template
    for key, value in wanted.items():
        if key not in found:
            yield f"{key} is missing and should be {describe(value)}"
        elif isinstance(value, list) and isinstance(found[key], list):
            yield from compare_lists(key, found[key], value)
        elif type(found[key]) is not type(value) or found[key] != value:
            yield f"{key} is {describe(found[key])} and should be {describe(value)}"
    yield from (f"{key} should not be in the file" for key in found.keys() - wanted.keys())


def compare_lists(key: str, found: list[Any], wanted: list[Any]) -> Iterator[str]:
    """Yield the first difference of two lists."""
    if len(found) != len(wanted):
        yield f"{key} has {len(found):,} entries and should have {len(wanted):,}"
        return
    differ = (n for n, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    for n in list(differ)[:1]:
        yield f"{key}[{n}] is {found[n]!r} and should be {wanted[n]!r}"


def describe(value: object) -> str:
    """Return a value as a message shows it."""
    if isinstance(value, float):
        return f"{value:.7g}"
    return f"{value[:40]!r}" if isinstance(value, str) else f"{value}"


def expected_shape(model: SmolLM2, path: Path, dtype: str) -> dict[str, Any]:
    """Return the keys that describe the model. Floats are stored in 32 bits."""
    c = model.config
    is_llama = c.norm == "rmsnorm"
    name = "llama" if is_llama else "stablelm"
    shape: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(np.float32(c.rope_theta)),
        f"attention.layer_norm{'_rms' if is_llama else ''}_epsilon": float(np.float32(c.norm_eps)),
    }
    if c.head_dim != c.hidden_size / c.num_attention_heads:
        shape |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if not is_llama:
        shape["use_parallel_residual"] = False
    general = {
        "architecture": name,
        "name": path.name.removesuffix(f"-{dtype}.gguf"),
        "file_type": {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}[dtype],
        **({"quantization_version": 2} if dtype == "q8_0" else {}),
    }
    return {f"{name}.{key}": v for key, v in shape.items()} | {f"general.{key}": v for key, v in general.items()}


def expected_tokenizer(model: SmolLM2, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the keys below `tokenizer.ggml` that describe the tokenizer."""
    spec = json.loads(tokenizer.backend.to_str())
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, types = [], []
    for i in range(model.config.vocab_size):
        try:
            tokens.append(tokenizer.token(i))
            types.append(1 if i not in added else 3 if added[i].special else 4)
        except KeyError:
            tokens.append(f"[PAD{i}]")
            types.append(5)
    end, end_of_turn, padding = tokenizer.end_of_text, find_end_of_turn(tokenizer), find_padding(tokenizer)
    ids = {"bos": find_begin_of_text(tokenizer), "eos": end, "eot": end_of_turn, "padding": padding}
    return {
        "model": "gpt2",
        "pre": "smollm" if '"Digits"' in json.dumps(spec["pre_tokenizer"]) else "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": [f"{a} {b}" for a, b in spec["model"]["merges"]] or [f"{tokens[end]} {tokens[end]}"],
        "add_bos_token": tokenizer.begin != [],
        "add_eos_token": tokenizer.end != [],
        "add_space_prefix": False,
        **{f"{role}_token_id": i for role, i in ids.items() if i is not None},
    }


def check_tensors(reader: Any, model: SmolLM2, dtype: str) -> Iterator[str]:
    """Yield how the file's tensors differ from the weights: each must be there, exactly as rounded to `dtype`."""
    from gguf.quants import dequantize

    wanted = dict(expected_tensors(model))
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, weight in wanted.items():
        if name not in found:
            needs = ": llama.cpp does not load a StableLM without it" if name == "output.weight" else ""
            yield f"the tensor {name} is missing{needs}"
            continue
        values = torch.from_numpy(np.array(dequantize(found[name].data, found[name].tensor_type), np.float32))
        if values.shape != weight.shape:
            yield f"the tensor {name} is {tuple(values.shape)} and should be {tuple(weight.shape)}"
        elif not is_equal(name, values, weight, model, dtype):
            yield explain(name, values, wanted, model, dtype)
    for name in found.keys() - wanted.keys():
        tied = name == "output.weight" and model.config.tie_word_embeddings
        yield f"the tensor {name} should not be in the file{': the head is tied to the embedding' if tied else ''}"


def expected_tensors(model: SmolLM2) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor's name with the weight that it contains, rows in the checkpoint's order."""
    c, weights = model.config, model.state_dict()
    norms = ("weight",) if c.norm == "rmsnorm" else ("weight", "bias")
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield from ((f"output_norm.{kind}", weights[f"model.norm.{kind}"]) for kind in norms)
    for n in range(c.num_hidden_layers):
        for short, part in PARTS.items():
            for kind in norms if "norm" in short else ("weight",):
                yield f"blk.{n}.{short}.{kind}", weights[f"model.layers.{n}.{part}.{kind}"]
    if c.norm == "layernorm" or not c.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight.detach()
    if c.rope_scaling:
        yield "rope_freqs.weight", torch.tensor(expected_factors(c))


def expected_factors(config: Any) -> list[float]:
    """Return how much longer Llama 3's scaling makes each wave of the positions."""
    scaling = config.rope_scaling
    context = scaling["original_max_position_embeddings"]
    longest, shortest = context / scaling["low_freq_factor"], context / scaling["high_freq_factor"]
    factors = []
    for n in range(0, config.head_dim, 2):
        length = 2 * math.pi * config.rope_theta ** (n / config.head_dim)
        if length < shortest:
            factors.append(1.0)
        elif length > longest:
            factors.append(float(scaling["factor"]))
        else:
            share = (context / length - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - share) / scaling["factor"] + share))
    return factors


def is_equal(name: str, values: Tensor, weight: Tensor, model: SmolLM2, dtype: str) -> bool:
    """Return whether a tensor of the file, with its rows put back, has exactly the rounded values of the weight."""
    if name == "rope_freqs.weight":  # computed in float32 by the writer, in float64 here
        return torch.allclose(values, weight, rtol=1e-5)
    rounded = round_weight(weight, dtype)
    return torch.equal(restore_order(name, values, model), rounded)


def restore_order(name: str, values: Tensor, model: SmolLM2) -> Tensor:
    """Return a tensor of the file with its rows in the checkpoint's order: llama.cpp's q and k alternate the halves."""
    c = model.config
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(name.split(".")[-2])
    if c.norm == "layernorm" or heads is None:
        return values
    rows = values.view(heads, c.head_dim, -1)
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1).flatten(0, 1)


def explain(name: str, values: Tensor, wanted: Mapping[str, Tensor], model: SmolLM2, dtype: str) -> str:
    """Return what is wrong with a tensor that differs from its weight."""
    part = name.split(".")[-2]
    if torch.equal(values, round_weight(wanted[name], dtype)):
        return f"{part.replace('attn_', '')}_proj rows are not in the order that llama.cpp expects ({name})"
    other = name.replace(part, SWAPS.get(part, part))
    if other != name and is_equal(name, values, wanted[other], model, dtype):
        return f"{name} has the weights of {other}"
    if name == "output.weight" and model.config.tie_word_embeddings:
        return f"{name} differs from the embedding, to which the head is tied"
    return f"{name} differs from the source's"


def round_weight(weight: Tensor, dtype: str) -> Tensor:
    """Return a weight with the values that `dtype` can store, in float32; norms stay as they are."""
    if weight.dim() == 1:
        return weight
    if dtype != "q8_0":
        return weight.to(getattr(torch, dtype)).float()
    blocks = weight.reshape(weight.shape[0], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale == 0, 0, blocks * (1 / scale))
    rounded = steps.sign() * (steps.abs() + 0.5).floor()  # half away from zero, as in C
    return (rounded * scale.half().float()).view_as(weight)
