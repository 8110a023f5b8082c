"""Convert a checkpoint from a file to a folder or back; it appears only if it was read again and is the same state."""

from pathlib import Path

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import content_hash
from smollm2.checkpoint.parts import divide_state
from smollm2.checkpoint.saving import save_state
from smollm2.config.schema import Config
from smollm2.errors import CheckpointError
from smollm2.storage.atomic import IO_OPS, IoOps, make_folder
from smollm2.storage.run_folder import checkpoint_path, parts_path


def convert(source: Path, target: Path, *, io_ops: IoOps = IO_OPS) -> None:
    """Write the checkpoint `source` as `target`: a file if its name ends with `.pt`, else a folder.

    Raise CheckpointError if the source is invalid, or the target exists or has not the name of this step's checkpoint,
    and ResourceError if it cannot be written.
    """
    state = load_checkpoint(source)
    name = (checkpoint_path if target.suffix else parts_path)(target.parent, state["step"]).name
    if target.name != name:
        raise CheckpointError(target, f"is not the name of step {state['step']}", f"call it {name}")
    if target.exists() or target.is_symlink():
        raise CheckpointError(target, "exists already", "remove it, or choose another folder")
    make_folder(target.parent, "folder")
    tied = Config.model_validate_json(state["config"]).model.tie_word_embeddings
    before = content_hash(state)
    written = state if target.suffix else divide_state(state, tied=tied)
    save_state(target.parent, written, is_newest=False, io_ops=io_ops)
    if content_hash(load_checkpoint(target)) != before:
        raise CheckpointError(target, "differs from its source", "do not use it; please report this")
