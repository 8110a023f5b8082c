"""Find and load the checkpoints of a run folder, by listing the folder; `latest.json` is only a hint."""

from collections.abc import Callable
from pathlib import Path

from smollm2.checkpoint.format import State
from smollm2.checkpoint.reading import read_detached, read_own_step
from smollm2.errors import CheckpointError, ResourceError, lay_out
from smollm2.storage.atomic import IO_OPS, IoOps
from smollm2.storage.run_folder import is_checkpoint, is_parted, step_of


def list_checkpoints(folder: Path, io_ops: IoOps = IO_OPS) -> list[Path]:
    """Return the files and folders in a folder that are named like checkpoints, lowest step first, without links."""
    try:
        files = [folder / name for name in io_ops.listdir(folder) if is_checkpoint(folder / name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ResourceError(folder, f"cannot be read ({error.strerror})", "make it readable") from error
    # Sorted by number: as text, step_10000 comes before step_9500. Never by modification time: the clock may jump.
    return sorted(files, key=lambda path: (step_of(path), path.name))


def load_checkpoint(path: Path) -> State:
    """Load a checkpoint, a file or folder of any name, to the CPU, without running any code from it.

    Raise CheckpointError, which names the problem, if it is missing or not a valid checkpoint.
    """
    try:
        absent = not path.exists() or (path.is_dir() and not is_parted(path))
    except OSError:
        absent = False  # the read below reports why
    if absent:
        raise CheckpointError(describe_missing(path))
    try:
        return read_detached(path)
    except CheckpointError as error:
        raise CheckpointError(
            path, str(error), "use another checkpoint, or continue from the newest valid one with --resume auto"
        ) from None


def find_resumable(folder: Path, report: Callable[[str], None]) -> tuple[Path, State] | None:
    """Return the path and state of the newest valid checkpoint in a folder, or None if the folder has no checkpoints.

    Each newer checkpoint that is rejected is reported. Raise CheckpointError if none is valid: a new run must not
    overwrite them.
    """
    refused = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_own_step(path)
        except CheckpointError as error:
            refused.append(f"{path.name}: {error}")
            report(lay_out(path, f"skipped: {error}", "trying the next older checkpoint"))
    if not refused:
        return None
    more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
    raise CheckpointError(
        folder,
        f"none of its checkpoints ({len(refused)}) can be used: {'; '.join(refused[:3])}{more}",
        "restore one from a backup, or start a new run with another --save_dir",
    )


def describe_missing(path: Path) -> str:
    """Return the message for a checkpoint that does not exist, listing those that do."""
    folder = path if path.is_dir() else path.parent
    names = [found.name for found in list_checkpoints(folder)]
    what = "is a folder" if path.is_dir() else "does not exist"
    if "XXXX" in path.name:
        what += "; XXXX stands for a step number"
    if not names:
        return lay_out(path, f"{what}, and {folder} contains no checkpoints", "train first, or choose another file")
    more = f", and {len(names) - 20} older ones" if len(names) > 20 else ""
    return f"{path}: {what}. {folder} contains {', '.join(names[-20:])}{more}."
