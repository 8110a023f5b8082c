"""Which checkpoints of a run are kept, which is the best, and which are moved aside when an older one is resumed."""

import contextlib
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.checkpoint.reading import is_valid
from smollm2.errors import ResourceError
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically
from smollm2.storage.run_folder import BEST, CHECKPOINT, METRICS, SUPERSEDED, is_checkpoint, next_step_path, step_of


def prune_checkpoints(
    folder: Path,
    keep_last: int,
    keep_every: int | None = None,
    *,
    protected: Collection[int] = (),
    io_ops: IoOps = IO_OPS,
) -> list[Path]:
    """Remove the checkpoints that are older than the newest `keep_last` valid ones, and return their paths.

    The best checkpoint, the steps in `protected` and multiples of `keep_every` are kept as well. A damaged file does
    not count as one of the newest, and is removed only if it is older than all of them. Call this after a save, while
    holding the folder's lock. Raise ResourceError if a file cannot be removed.
    """
    if keep_last < 2:
        raise ValueError(f"keep_last is {keep_last}; below 2 one damaged file would end a run")
    newest_first = list_checkpoints(folder, io_ops)[::-1]
    valid, older = 0, []
    for position, path in enumerate(newest_first):
        if is_valid(path):
            valid += 1
        if valid == keep_last:
            older = newest_first[position + 1 :]
            break
    best = _read_best(folder)
    if not older or (best is None and (folder / BEST).exists()):
        return []  # it is unknown which one is the best: none may be removed
    removed = []
    for path in reversed(older):
        step = step_of(path)
        if step in protected or path.name == (best or {}).get("file") or (keep_every and step % keep_every == 0):
            continue
        try:
            remove_checkpoint(path, io_ops)
        except OSError as error:
            raise ResourceError(path, f"cannot be removed ({error.strerror})", "remove it by hand") from error
        removed.append(path)
    return removed


def remove_checkpoint(path: Path, io_ops: IoOps) -> None:
    """Remove a checkpoint and the record of its next step; a folder first gets a name under which it is no checkpoint,
    because its files go one by one."""
    if next_step_path(path).exists():
        io_ops.unlink(next_step_path(path))
    if not path.is_dir():
        io_ops.unlink(path)
        return
    gone = path.with_name(f".{path.name}.tmp.{os.getpid()}-{secrets.token_hex(4)}")
    io_ops.replace(path, gone)
    shutil.rmtree(gone)


def record_best(folder: Path, path: Path, validation_loss: float, *, windows: int = 0, io_ops: IoOps = IO_OPS) -> bool:
    """Write `best.json` if this checkpoint has the lowest validation loss so far; return whether it was written.

    `windows` is the number of validation windows on which the loss was measured. If it differs from the number in
    `best.json`, the losses are not comparable, and this checkpoint becomes the best.
    """
    best = _read_best(folder)
    is_comparable = best is not None and best.get("windows", windows) == windows
    if best and is_comparable and is_checkpoint(folder / best["file"]) and validation_loss >= best["validation_loss"]:
        return False
    if not math.isfinite(validation_loss):
        return False
    _write_best(folder, path, validation_loss, windows, io_ops)
    return True


def recompute_best(folder: Path, windows: int, io_ops: IoOps = IO_OPS) -> None:
    """Update `best.json` to name the best of the remaining checkpoints if the one that it names is gone.

    The losses are read from the rows of metrics.jsonl that were measured on `windows` windows. If no remaining
    checkpoint has one, `best.json` is removed.
    """
    best = _read_best(folder)
    if best is None or is_checkpoint(folder / best["file"]):
        return
    losses = _read_validation_losses(folder, windows)
    left = [path for path in list_checkpoints(folder, io_ops) if step_of(path) in losses]
    if left:
        lowest = min(left, key=lambda path: losses[step_of(path)])
        _write_best(folder, lowest, losses[step_of(lowest)], windows, io_ops)
    else:
        io_ops.unlink(folder / BEST)


def move_superseded(folder: Path, step: int, io_ops: IoOps = IO_OPS) -> list[Path]:
    """Move the checkpoints after `step` to `superseded/`, each under an unused name; return the new paths.

    A run that resumes from an older checkpoint replaces the later steps. If it is then killed, `--resume auto` must not
    find the checkpoints of the replaced steps.
    """
    later = [path for path in list_checkpoints(folder, io_ops) if step_of(path) > step]
    if not later:
        return []
    target = folder / SUPERSEDED
    if target.is_symlink():
        raise ResourceError(target, "is a symbolic link", "remove it, or choose another --save_dir")
    try:
        target.mkdir(exist_ok=True)
        moved = [_free_name(target, path) for path in later]
        for path, new_path in zip(later, moved, strict=True):
            with contextlib.suppress(FileNotFoundError):
                io_ops.replace(next_step_path(path), next_step_path(new_path))
            io_ops.replace(path, new_path)
        io_ops.fsync_dir(target)
        io_ops.fsync_dir(folder)
    except OSError as error:
        raise ResourceError(target, f"cannot be written to ({error.strerror})", "make it writable") from error
    return moved


def _free_name(folder: Path, path: Path) -> Path:
    names = itertools.chain([path.name], (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def _read_validation_losses(folder: Path, windows: int) -> dict[int, float]:
    """Return the validation loss by step, from the metrics rows whose loss was measured on `windows` windows."""
    losses: dict[int, float] = {}
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        return losses
    for line in lines:
        try:
            row = json.loads(line)
            # Rows written by older versions have no `validation_windows`.
            if row.get("validation_windows", windows) == windows and math.isfinite(row["validation_loss"]):
                losses[int(row["step"])] = float(row["validation_loss"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return losses


def _write_best(folder: Path, path: Path, validation_loss: float, windows: int, io_ops: IoOps) -> None:
    found: dict[str, str | int | float] = {
        "file": path.name,
        "step": step_of(path),
        "validation_loss": float(validation_loss),
        "windows": windows,
    }
    write_atomically(folder / BEST, to_json(found), io_ops=io_ops)


def _read_best(folder: Path) -> dict[str, Any] | None:
    """Return the content of best.json, or None if it is missing or damaged."""
    try:
        best = json.loads((folder / BEST).read_bytes())
    except (OSError, ValueError):
        return None
    is_sound = isinstance(best, dict) and isinstance(best.get("file"), str) and CHECKPOINT.fullmatch(best["file"])
    return best if is_sound and type(best.get("validation_loss")) is float else None


def to_json(value: Mapping[str, object]) -> bytes:
    """Return `value` as the bytes of a small, indented JSON file."""
    return json.dumps(value, indent=2).encode() + b"\n"
