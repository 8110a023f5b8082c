"""The verification of an export: the folder is loaded from disk and compared with its source on real text.

Every usable reader (readers.py) loads it. The logits reveal a wrong weight, rotary base or layout. A wrong epsilon or
end-of-text id hardly changes them, so the fields of the config are also compared one by one.
"""

import hashlib
import json
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smollm2
from smollm2.config.model_folder import read_hugging_face_config
from smollm2.data.sample import read_topics
from smollm2.data.text import open_text
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.tokenizer_files import GENERATION
from smollm2.errors import Smollm2Error
from smollm2.exporting.readers import (
    HOSTILE,
    Reading,
    Reference,
    UnusableReader,
    continue_greedily,
    find_difference,
    read_with_smollm2,
    read_with_transformers,
    run_model,
)
from smollm2.exporting.special_tokens import find_begin_of_text
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.memory import return_freed_memory

WINDOWS, WINDOW, PROMPT = 2, 256, 32

FALLBACK_TEXT = (
    "A model is a function of its weights, and a copy of the weights that gives other numbers is no copy. " * 40
)


def certify(folder: Path, model: SmolLM2, tokenizer: Tokenizer, dtype: torch.dtype, text: str) -> dict[str, Any]:
    """Compare the folder with its source. `passed` says whether it is the same model; `problems` lists the differences.

    The weights of `model` are dropped, because each reader loads its own.
    """
    windows = take_windows(tokenizer, text, model.config.max_position_embeddings)
    exact, problems = None, check_weights(folder, model)
    if problems:  # as is right if `dtype` does not hold the weights exactly
        exact = run_model(model, windows)
        round_weights(model, dtype)
        problems = check_weights(folder, model)
    reference = make_reference(model, tokenizer, windows)
    exact_logits, exact_loss = exact or (reference.logits, reference.loss)
    model.to("meta")
    found: list[Reading | UnusableReader] = []
    for read in (read_with_smollm2, read_with_transformers):
        return_freed_memory()
        found.append(read(folder, reference))
    problems += check_config(folder, model, tokenizer) + check_files(folder, tokenizer)
    name = str(dtype).removeprefix("torch.")
    return summarize(found, problems, name, text, reference, exact_logits, exact_loss)


def summarize(
    found: Sequence[Reading | UnusableReader],
    problems: list[str],
    dtype: str,
    text: str,
    reference: Reference,
    exact_logits: Tensor,
    exact_loss: float,
) -> dict[str, Any]:
    """Return the certificate: what each reader found, after other problems, and what rounding to `dtype` changed."""
    readings = [one for one in found if isinstance(one, Reading)]
    problems = problems + [f"{reading.reader}: {problem}" for reading in readings for problem in reading.problems]
    return {
        "passed": not problems,
        "problems": problems,
        "dtype": dtype,
        "text": {"tokens": reference.windows.numel(), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "source": {"loss": exact_loss, "smollm2": smollm2.__version__, "torch": str(torch.__version__)},
        "rounding": {
            "loss": reference.loss,
            "max_logit_difference": (reference.logits - exact_logits).abs().max().item(),
        },
        "tokenizer": {
            "texts": len(HOSTILE),
            "texts_that_come_back": sum(a == b for a, b in zip(HOSTILE, reference.decoded, strict=True)),
        },
        "readers": [asdict(reading) for reading in readings],
        "unusable_readers": [asdict(one) for one in found if isinstance(one, UnusableReader)],
    }


def choose_text(file: str | Path | None = None) -> str:
    """Return the text to compare on: the beginning of `file`, or of Python's language reference.

    Raise DataError if the file is unusable.
    """
    if file is not None:
        with tempfile.TemporaryDirectory() as spool:
            return next(open_text(str(file), Path(spool)).chunks()).text
    topics = (topic for _, topic in read_topics(Path(sysconfig.get_path("stdlib"))))
    found = ""
    while len(found) < 8192 and (topic := next(topics, None)):
        found += topic + "\n"
    return found or FALLBACK_TEXT


def take_windows(tokenizer: Tokenizer, text: str, positions: int) -> Tensor:
    """Return two windows (N, T) from the start of a text, each after an end-of-text token; short texts are repeated."""
    length = min(positions, WINDOW)
    ids = tokenizer.encode(text[: 64 * WINDOWS * WINDOW]) or [tokenizer.end_of_text]
    ids = ids * -(-WINDOWS * length // len(ids))
    rows = [[tokenizer.end_of_text, *ids[n * (length - 1) : (n + 1) * (length - 1)]] for n in range(WINDOWS)]
    return torch.tensor(rows)


@torch.no_grad()
def round_weights(model: SmolLM2, dtype: torch.dtype) -> None:
    """Round every weight to the values of `dtype`, in place; the weights are still stored as float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def make_reference(model: SmolLM2, tokenizer: Tokenizer, windows: Tensor, *, continues: bool = True) -> Reference:
    """Return the results of the source, which every reader must reproduce; its greedy text only if one of them `continues`."""
    logits, loss = run_model(model, windows)
    prompt = windows[0, : min(PROMPT, windows.shape[1] // 2)].tolist()
    continuation, gaps = continue_greedily(model, prompt, tokenizer.stops) if continues else ([], [])
    ids = [tokenizer.encode(text) for text in HOSTILE]
    decoded = [tokenizer.decode(row) for row in ids]
    ends = tokenizer.chat_template, tokenizer.stops
    return Reference(windows, logits, loss, prompt, continuation, gaps, ids, decoded, *ends)


def check_weights(folder: Path, model: SmolLM2) -> list[str]:
    """Return which weight in the folder's files is not the source's; nothing for invalid files, which the readers name."""
    try:
        name = find_difference(model, folder)
    except Smollm2Error:
        return []
    return [f"{name} differs from the source's"] if name else []


def check_config(folder: Path, model: SmolLM2, tokenizer: Tokenizer) -> list[str]:
    """Return how the folder's configs differ from the source: first as this package reads them, then field by field."""
    try:
        config, generation = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        shape = read_hugging_face_config(folder)
    except (OSError, ValueError, Smollm2Error) as error:
        return [f"its configs cannot be read ({error})"]
    problems = [
        f"{name} is {getattr(shape, name)} and should be {value}"
        for name, value in model.config.model_dump(exclude={"init_from"}).items()
        if getattr(shape, name) != value
    ]
    problems += [
        f"{name} is {config.get(name)} in config.json and should be {value}"
        for name, value in expected_fields(model, tokenizer).items()
        if config.get(name) != value
    ]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_theta") != model.config.rope_theta:
        problems.append(
            f"rope_parameters.rope_theta is {rope.get('rope_theta')} and should be {model.config.rope_theta}"
        )
    if GENERATION in tokenizer.files:  # compared byte for byte
        return problems
    for name, wanted in token_ids(tokenizer).items():
        if generation.get(name) != wanted:
            problems.append(f"{name} is {generation.get(name)} in generation_config.json and should be {wanted}")
    return problems


def check_files(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return which files that came with the tokenizer are not in the folder as they were."""
    problems = []
    for name, content in tokenizer.files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            problems.append(f"{name} is not the file that came with the tokenizer")
    return problems


def token_ids(tokenizer: Tokenizer) -> dict[str, object]:
    """Return the ids that begin and end a text, by transformers' names."""
    return {"bos_token_id": find_begin_of_text(tokenizer), "eos_token_id": tokenizer.end_of_text}


def expected_fields(model: SmolLM2, tokenizer: Tokenizer) -> Mapping[str, object]:
    """Return the fields that transformers reads, but `read_hugging_face_config` ignores or reads in only one place."""
    eps = "rms_norm_eps" if model.config.norm == "rmsnorm" else "layer_norm_eps"
    fields: dict[str, object] = {
        "rope_theta": model.config.rope_theta,
        eps: model.config.norm_eps,
        **token_ids(tokenizer),
    }
    return fields if model.config.norm == "rmsnorm" else {**fields, "partial_rotary_factor": 1.0}
