"""Which checkpoints of a run stay, which is the best, and which a rollback moves out of the way."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.checkpoint.validation import is_valid
from smollm2.errors import ResourceError
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically
from smollm2.storage.run_folder import BEST, CHECKPOINT, step_of


def prune_checkpoints(
    folder: Path,
    keep_last: int,
    keep_every: int | None = None,
    *,
    protected: Collection[int] = (),
    io_ops: IoOps = IO_OPS,
) -> list[Path]:
    """Remove what is older than the newest `keep_last` valid checkpoints; returns what went.

    Stays: the best, the steps in `protected` (the one resumed from), multiples of `keep_every`. A damaged file counts
    for nothing: it neither takes the place of a valid one nor goes before it is that old. Call it after a save, under
    the folder's lock. Raises ResourceError where a file cannot be removed.
    """
    if keep_last < 2:
        raise ValueError(f"keep_last is {keep_last}; below 2 one damaged file is the end of a run")
    newest_first = list_checkpoints(folder, io_ops)[::-1]
    valid, older = 0, []
    for position, path in enumerate(newest_first):
        valid += is_valid(path)
        if valid == keep_last:
            older = newest_first[position + 1 :]
            break
    best = _read_best(folder)
    if not older or (best is None and (folder / BEST).exists()):
        return []  # without knowing which one is the best, none may go
    removed = []
    for path in reversed(older):
        step = step_of(path)
        if step in protected or path.name == (best or {}).get("file") or (keep_every and step % keep_every == 0):
            continue
        try:
            io_ops.unlink(path)
        except OSError as error:
            raise ResourceError(f"{path} - it cannot be removed: {error.strerror} - remove it by hand") from error
        removed.append(path)
    return removed


def note_best(folder: Path, path: Path, step: int, validation_loss: float, io_ops: IoOps = IO_OPS) -> bool:
    """Write `best.json` where this checkpoint has a lower validation loss than the one that it names; whether it has."""
    best = _read_best(folder)
    if best and (folder / best["file"]).is_file() and validation_loss >= best["validation_loss"]:
        return False
    if not math.isfinite(validation_loss):
        return False
    found: dict[str, str | int | float] = {"file": path.name, "step": step, "validation_loss": float(validation_loss)}
    write_atomically(folder / BEST, to_json(found), io_ops=io_ops)
    return True


def set_aside_later(folder: Path, step: int, io_ops: IoOps = IO_OPS) -> list[Path]:
    """Rename the checkpoints after `step` to `step_XXXX.pt.superseded`; returns the new names.

    A run that goes on from an older checkpoint takes another course: after a kill, `--resume auto` must not find the
    newer files of the course that was left.
    """
    later = [path for path in list_checkpoints(folder, io_ops) if step_of(path) > step]
    for path in later:
        io_ops.replace(path, path.with_name(f"{path.name}.superseded"))
    return [path.with_name(f"{path.name}.superseded") for path in later]


def _read_best(folder: Path) -> dict[str, Any] | None:
    """What best.json says; None where it is absent or damaged."""
    try:
        best = json.loads((folder / BEST).read_bytes())
    except (OSError, ValueError):
        return None
    sound = isinstance(best, dict) and isinstance(best.get("file"), str) and CHECKPOINT.fullmatch(best["file"])
    return best if sound and type(best.get("validation_loss")) is float else None


def to_json(value: Mapping[str, str | int | float]) -> bytes:
    """Return the bytes of a small JSON file."""
    return json.dumps(value, indent=2).encode() + b"\n"
