"""Read a checkpoint, a file or a folder, into memory."""

from pathlib import Path

from smollm2.checkpoint.format import State
from smollm2.checkpoint.parts import SKELETON
from smollm2.checkpoint.validation import detach_from_disk, read_checked
from smollm2.errors import CheckpointError
from smollm2.storage.run_folder import step_of


def read_detached(path: Path) -> State:
    """Return the verified state stored in a file or folder, in memory. Raise CheckpointError as `read_checked` does."""
    if is_folder(path):
        from smollm2.checkpoint.parts_reading import read_parts  # it imports DCP, which a file does not need

        return read_parts(path)
    return detach_from_disk(read_checked(path))


def read_own_step(path: Path) -> State:
    """Return the verified state stored in a file or folder; the step in its name must be the state's step."""
    state = read_detached(path)
    if state["step"] != step_of(path):
        raise CheckpointError(f"contains step {state['step']}, which does not match its name")
    return state


def is_valid(path: Path) -> bool:
    """Return whether the file or folder is a valid checkpoint of the step in its name."""
    try:
        if path.is_dir():
            from smollm2.checkpoint.parts_reading import read_manifest

            read_manifest(path)
        found = read_checked(path / SKELETON if path.is_dir() else path)
        if found["step"] != step_of(path):
            return False
    except CheckpointError:
        return False
    return True


def is_folder(path: Path) -> bool:
    """Return whether the path is a folder; False for a name that no file system takes."""
    try:
        return path.is_dir()
    except OSError:
        return False
