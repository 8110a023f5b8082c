"""The verification of a GGUF file: every key, token and tensor by the package gguf, and what llama.cpp computes with it.

The keys are computed here a second time, from the model and the tokenizer, because the writer's own list would hide its
mistakes. llama.cpp reads only a file that passed, because it ends the whole process on some faulty files.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.exporting.certificate import make_reference, summarize, take_windows
from smollm2.exporting.readers import (
    Reading,
    Reference,
    Tolerance,
    UnusableReader,
    compare_greedy,
    compare_logits,
    compare_tokenizer,
    describe_error,
    run_model,
)
from smollm2.exporting.special_tokens import find_begin_of_text, find_end_of_turn, find_padding
from smollm2.model.transformer import SmolLM2

TOLERANCES = {
    "float32": Tolerance(),
    "float16": Tolerance(logits=1e-2, tie=1e-2, loss=1e-3, argmax_agreement=0.98),
    "bfloat16": Tolerance(logits=5e-2, tie=5e-2, loss=5e-3, argmax_agreement=0.9),
    "q8_0": Tolerance(logits=0.1, tie=0.1, loss=1e-2, argmax_agreement=0.9),
}
"""llama.cpp rounds not only the weights, but also what it multiplies them by, to the dtype of the file."""

PERPLEXITY_TOLERANCE = 0.01
"""How much q8_0 may change the perplexity, relative to the checkpoint's."""

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


def certify_gguf(path: Path, model: SmolLM2, tokenizer: Tokenizer, dtype: str, text: str) -> dict[str, Any]:
    """Compare the file with its source, as `certify` does. The matrices of `model` are rounded to `dtype` in place."""
    import gguf

    windows = take_windows(tokenizer, text, model.config.max_position_embeddings)
    exact_logits, exact_loss = run_model(model, windows)
    reader = gguf.GGUFReader(path)
    problems = [*check_keys(reader, model, tokenizer, path, dtype), *check_tensors(reader, model, dtype)]
    round_matrices(model, dtype)
    reference = make_reference(model, tokenizer, windows)
    found = (
        UnusableReader("llama.cpp", "the file is faulty") if problems else read_with_llama_cpp(path, reference, dtype)
    )
    losses = {"the file": reference.loss}
    losses |= {found.reader: found.loss} if isinstance(found, Reading) else {}
    problems += [
        f"{name}: {dtype} changes the perplexity by {np.expm1(loss - exact_loss):+.2%}"
        for name, loss in losses.items()
        if dtype == "q8_0" and not abs(np.expm1(loss - exact_loss)) <= PERPLEXITY_TOLERANCE
    ]
    file = {
        "name": path.name,
        "reader": f"gguf {find_version('gguf')}",
        "keys": sum(not key.startswith("GGUF.") for key in reader.fields),
        "tensors": len(reader.tensors),
        "tokens": model.config.vocab_size,
    }
    return {**summarize([found], problems, dtype, text, reference, exact_logits, exact_loss), "file": file}


def find_version(package: str) -> str:
    """Return the installed version of a package."""
    from importlib.metadata import version

    return version(package)


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


def is_equal(name: str, values: Tensor, weight: Tensor, model: SmolLM2, dtype: str) -> bool:
    """Return whether a tensor of the file, with its rows put back, has exactly the rounded values of the weight."""
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


@torch.no_grad()
def round_matrices(model: SmolLM2, dtype: str) -> None:
    """Round every matrix to the values of `dtype`, in place."""
    for parameter in model.parameters():
        parameter.copy_(round_weight(parameter, dtype))


def read_with_llama_cpp(path: Path, reference: Reference, dtype: str) -> Reading | UnusableReader:
    """Compute with llama.cpp, with a float32 cache, or return why it cannot be used here."""
    try:
        import llama_cpp
    except Exception as error:  # a broken installation may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == "llama_cpp"
        return UnusableReader("llama.cpp", "llama-cpp-python is not installed" if absent else describe_error(error))
    reading = Reading(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})")
    with without_messages(llama_cpp):
        try:
            compare_with_llama_cpp(llama_cpp, path, reference, reading, TOLERANCES[dtype])
        except Exception as error:  # llama-cpp-python raises nothing narrower
            reading.problems.append(f"does not load ({describe_error(error)})")
    return reading


@contextlib.contextmanager
def without_messages(llama_cpp: Any) -> Iterator[None]:
    """Silence llama.cpp, which warns on standard error even if asked for nothing; restore its own output afterwards."""
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # a name keeps it alive
    llama_cpp.llama_log_set(silent, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


def compare_with_llama_cpp(
    llama_cpp: Any, path: Path, reference: Reference, reading: Reading, tolerance: Tolerance
) -> None:
    """Load the file with llama.cpp, and compare its results with the source's."""
    length = max(reference.windows.shape[1], len(reference.prompt) + len(reference.continuation))
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(
        str(path), n_ctx=length, n_batch=length, n_gpu_layers=0, logits_all=True, verbose=False, **cache
    )
    try:
        compare_logits(reading, compute_logits(llama, reference.windows), reference, tolerance)
        found = continue_with(llama, reference.prompt, len(reference.continuation))
        compare_greedy(reading, found, reference, tolerance)
        compare_tokenizer(
            reading,
            lambda text: [int(i) for i in llama.tokenize(text.encode(), add_bos=False, special=False)],
            lambda ids: str(llama.detokenize(list(ids)).decode("utf-8", "replace")),
            reference,
        )
    finally:
        llama.close()


def compute_logits(llama: Any, windows: Tensor) -> Tensor:
    """Return the logits (N, T, V) of each window."""
    found = []
    for window in windows.tolist():
        llama.reset()
        llama.eval(window)
        found.append(torch.from_numpy(np.array(llama.scores[: len(window)])))
    return torch.stack(found)


def continue_with(llama: Any, prompt: list[int], length: int) -> list[int]:
    """Return the greedy continuation of a prompt."""
    llama.reset()
    llama.eval(prompt)
    ids: list[int] = []
    while len(ids) < length:
        ids.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(ids[-1:])
    return ids
