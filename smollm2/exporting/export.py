"""Export a model to a folder that other programs load; it appears only if it contains the same model.

The folder is written under a temporary name, read again from the disk, compared with the source and then renamed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm2.data.text import expand_home
from smollm2.errors import CheckpointError, ConfigError
from smollm2.exporting import gguf, hugging_face
from smollm2.exporting.card import write_card
from smollm2.exporting.certificate import certify, choose_text
from smollm2.exporting.gguf_readers import certify_gguf
from smollm2.exporting.hugging_face import DTYPES, SHARD_BYTES
from smollm2.exporting.source import Source, read_source
from smollm2.exporting.target import GGUF_DTYPES, check_room, check_target, finish_files, write_json
from smollm2.inference.weight_files import open_weights
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically, write_folder_atomically

FORMATS = {"huggingface": tuple(DTYPES), "gguf": (*GGUF_DTYPES, "bf16", "fp16")}
"""The formats, with the dtypes in which each stores weights."""

FULL_NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def export(
    path: str | Path,
    folder: str | Path,
    format: str = "huggingface",
    *,
    dtype: str = "",
    best: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    text_file: str | Path | None = None,
    report: Callable[[str], None] = lambda message: None,
    io_ops: IoOps = IO_OPS,
) -> dict[str, Any]:
    """Write the model in `path` (a `.pt`, a run folder or a Hugging Face folder) to `folder`, as `huggingface` or `gguf`.

    Return the results of the verification, as in parity.json.

    The folder appears only if this package, and transformers if it is usable here, can load it from disk and reproduce
    the source's logits, loss, greedy text and token ids on the beginning of `text_file` (default: Python's language
    reference). A GGUF file is compared by the package gguf, key by key and tensor by tensor, and by llama.cpp if it is
    usable. `dtype` is by default that of a Hugging Face folder, and float32 for a checkpoint. From a run folder, the newest
    checkpoint or the `best` one is exported; `report` is called with a line for each checkpoint skipped. `force` replaces
    an earlier export. Raise ConfigError for an unknown format or dtype, CheckpointError, DataError or ResourceError.
    """
    path, folder = expand_home(path), expand_home(folder)
    dtype = dtype or stored_dtype(path)
    check_options(format, dtype, shard_bytes)
    check_target(path, folder, force=force)
    text = choose_text(text_file)
    source = read_source(path, best=best, report=report)
    if format == "gguf":
        dtype = FULL_NAMES.get(dtype, dtype)
        size = gguf.check_source(source, path, dtype)
    else:
        size = hugging_face.check_source(source, path, dtype)
    check_room(size, folder, io_ops)
    certificate: dict[str, Any] = {}

    def fill(temporary: Path) -> None:
        certificate.update(write_format(source, temporary, format, folder.name, dtype, shard_bytes, text, io_ops))
        if not certificate["passed"]:
            what = f"the exported model differs from its source ({'; '.join(certificate['problems'][:3])})"
            raise CheckpointError(folder, what, "nothing was written; please report this")
        write_json(temporary / "parity.json", certificate, io_ops)
        card = write_card(source, certificate, folder.name)
        write_atomically(temporary / "README.md", card.encode(), io_ops=io_ops)
        finish_files(temporary)

    write_folder_atomically(folder, fill, replaces=folder.exists(), io_ops=io_ops)
    return certificate


def stored_dtype(path: Path) -> str:
    """Return the dtype of all weights in a Hugging Face folder; float32 if they differ, or for a checkpoint."""
    if not (path / "config.json").exists():
        return "float32"
    found = set(open_weights(path).dtypes.values())
    return next((name for name, dtype in DTYPES.items() if found == {dtype}), "float32")


def write_format(
    source: Source, folder: Path, format: str, name: str, dtype: str, shard_bytes: int, text: str, io_ops: IoOps
) -> dict[str, Any]:
    """Write a model in a format to an existing folder, and return its certificate."""
    if format == "gguf":
        file = gguf.write_gguf_folder(source, folder, name, dtype, io_ops)
        return certify_gguf(file, source.model, source.tokenizer, dtype, text)
    hugging_face.write_model_folder(source, folder, dtype=dtype, shard_bytes=shard_bytes, io_ops=io_ops)
    return certify(folder, source.model, source.tokenizer, DTYPES[dtype], text)


def check_options(format: str, dtype: str, shard_bytes: int) -> None:
    """Raise ConfigError for an invalid option."""
    if format not in FORMATS:
        raise ConfigError("format", f"{format!r} is unknown", f"use {' or '.join(map(repr, FORMATS))}")
    if dtype not in FORMATS[format]:
        what = f"{dtype!r} is unknown for the format {format}"
        raise ConfigError("dtype", what, f"use one of {', '.join(FORMATS[format])}")
    if shard_bytes < 1:
        raise ConfigError("shard_bytes", f"{shard_bytes} is too small", "use 1 or more")
