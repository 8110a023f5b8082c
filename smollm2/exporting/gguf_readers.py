"""The verification of a GGUF file: every key, token and tensor (gguf_contents.py), and what llama.cpp computes with it.

llama.cpp reads only a file with the right contents, because it ends the whole process on some faulty files.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.exporting.certificate import make_reference, summarize, take_windows
from smollm2.exporting.gguf_contents import check_keys, check_tensors, round_weight
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

MOST_BYTES = 4096
"""Room for the text of one token."""


def certify_gguf(path: Path, model: SmolLM2, tokenizer: Tokenizer, dtype: str, text: str) -> dict[str, Any]:
    """Compare the file with its source, as `certify` does. The matrices of `model` are rounded to `dtype` in place."""
    import gguf

    windows = take_windows(tokenizer, text, model.config.max_position_embeddings)
    exact_logits, exact_loss = run_model(model, windows)
    reader = gguf.GGUFReader(path)
    problems = [*check_keys(reader, model, tokenizer, path, dtype), *check_tensors(reader, model, dtype)]
    round_matrices(model, dtype)
    llama_cpp = UnusableReader("llama.cpp", "the file is faulty") if problems else import_llama_cpp()
    found: Reading | UnusableReader
    if isinstance(llama_cpp, UnusableReader):
        reference, found = make_reference(model, tokenizer, windows, continues=False), llama_cpp
    else:
        reference = make_reference(model, tokenizer, windows)
        found = read_with_llama_cpp(llama_cpp, path, reference, dtype)
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


@torch.no_grad()
def round_matrices(model: SmolLM2, dtype: str) -> None:
    """Round every matrix to the values of `dtype`, in place."""
    for parameter in model.parameters():
        parameter.copy_(round_weight(parameter, dtype))


def import_llama_cpp() -> Any:
    """Return the module llama_cpp, or an UnusableReader that says why it cannot be used here."""
    try:
        import llama_cpp
    except Exception as error:  # a broken installation may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == "llama_cpp"
        return UnusableReader("llama.cpp", "llama-cpp-python is not installed" if absent else describe_error(error))
    return llama_cpp


def read_with_llama_cpp(llama_cpp: Any, path: Path, reference: Reference, dtype: str) -> Reading:
    """Compute with llama.cpp, with a float32 cache, and compare the results with the source's."""
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
            lambda ids: b"".join(spell(llama_cpp, llama, i) for i in ids).decode("utf-8", "replace"),
            reference,
        )
    finally:
        llama.close()


def spell(llama_cpp: Any, llama: Any, token: int) -> bytes:
    """Return the bytes of a token; `Llama.detokenize` loses those longer than its buffer of 32 (0.3.36, measured)."""
    buffer = ctypes.create_string_buffer(MOST_BYTES)
    length = llama_cpp.llama_token_to_piece(llama._model.vocab, token, buffer, MOST_BYTES, 0, False)
    return buffer.raw[: max(0, length)]


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
