"""The folder that an export writes: whether it may be written, has room, and is synced."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smollm2.data.tokenizer_files import KEPT, TOKENIZER
from smollm2.errors import CheckpointError, ResourceError
from smollm2.formatting import format_bytes
from smollm2.storage.atomic import IoOps, sync_file, write_atomically

OTHER_FILES = 40_000_000
"""Bytes reserved for the tokenizer, the model card and the configs; the largest tokenizer.json in use takes 33 MB."""

OWN_FILES = {
    "config.json",
    "model.safetensors.index.json",
    TOKENIZER,
    *KEPT,
    "Modelfile",
    "parity.json",
    "README.md",
}
"""The files of an export besides its weights; --force replaces a folder only if it holds no other files."""

GGUF_DTYPES = ("float32", "float16", "bfloat16", "q8_0")
"""How a GGUF file can store the weights; the name of the file ends with it."""


def check_target(path: Path, folder: Path, *, force: bool) -> None:
    """Raise CheckpointError if writing to the target would damage the source or files not written by an export."""
    source, target = path.resolve(), folder.resolve()
    if source.is_dir() and target.is_relative_to(source):
        raise CheckpointError(folder, f"the folder is inside the source {path}", "choose a folder outside it")
    if target in source.parents:
        raise CheckpointError(folder, f"the folder contains the source {path}", "choose another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(folder, "this is a file or a link, not a folder", "choose another path")
    if not folder.exists():
        return
    if not force:
        raise CheckpointError(folder, "the folder already exists", "choose another folder, or replace it with --force")
    foreign = [file.name for file in folder.iterdir() if not is_own_file(file)]
    if foreign:
        raise CheckpointError(
            folder, f"the folder contains {foreign[0]}, which was not written by an export", "choose another folder"
        )


def is_own_file(file: Path) -> bool:
    """Return whether a file may be removed, because exports write files of that name."""
    is_weights = file.name.startswith("model") and file.suffix == ".safetensors"
    is_gguf = file.name in {gguf_name(file.parent.name, dtype) for dtype in GGUF_DTYPES}
    return file.is_file() and (file.name in OWN_FILES or is_weights or is_gguf)


def gguf_name(name: str, dtype: str) -> str:
    """Return the name of the GGUF file in the folder `name`."""
    return f"{name}-{dtype}.gguf"


def check_room(weights: int, folder: Path, io_ops: IoOps) -> None:
    """Raise ResourceError if the disk has too little space for this many bytes of weights, before anything is written."""
    need = weights + OTHER_FILES
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        free = io_ops.free_bytes(existing)
    except OSError as error:
        what = f"the free space cannot be determined ({error.strerror})"
        raise ResourceError(existing, what, "choose another folder") from None
    if free < need:
        what = f"the export needs {format_bytes(need)}, but only {format_bytes(free)} is free"
        raise ResourceError(folder, what, "free some space or choose another disk")


def write_json(path: Path, value: Mapping[str, Any], io_ops: IoOps) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode(), io_ops=io_ops)


def finish_files(folder: Path) -> None:
    """Give the files, which only this user could access so far, the folder's permissions, and sync them to disk."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
        sync_file(path)
