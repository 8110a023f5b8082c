"""Write a checkpoint as a folder, by all ranks together and completely or not at all (parts.py)."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save

from smollm2.checkpoint.parts import MODEL, SKELETON, Part, PartedState, describe_file, without_a_warning
from smollm2.checkpoint.retention import to_json
from smollm2.checkpoint.validation import find_wrong_weight, read_checked
from smollm2.errors import ResourceError, TrainingError
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically
from smollm2.storage.run_folder import LATEST, MANIFEST, parts_path


class SavePlanner(DefaultSavePlanner):
    """Finds the rows that DCP asks for."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return this rank's rows of a tensor."""
        part: Part = self.state_dict[index.fqn]
        return part.tensor


class Writer(filesystem.FileSystemWriter):
    """DCP's writer, without the path of the temporary folder in the metadata."""

    def __init__(self, folder: Path, files: "Files") -> None:
        super().__init__(folder, sync_files=False)  # Stream syncs
        self.fs = files

    def storage_meta(self) -> StorageMeta:
        """Return what the metadata says about the place: nothing."""
        return StorageMeta()


class Stream:
    """The file that DCP writes to; it hashes what passes through."""

    def __init__(self, file: FileIO, io_ops: IoOps) -> None:
        self.file, self.io_ops, self.digest, self.length = file, io_ops, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data` and return its length."""
        self.io_ops.write(self.file, data)
        self.digest.update(data)
        self.length += len(data)
        return len(data)

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self.length

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def close(self) -> None:
        """Flush the file to disk."""
        self.io_ops.fsync(self.file)


class Files(filesystem.FileSystem):
    """The files of one rank, written through `io_ops`; `written` holds their sizes and hashes by name."""

    def __init__(self, io_ops: IoOps) -> None:
        self.io_ops, self.written = io_ops, dict[str, tuple[int, str]]()
        self.problem: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a new file for writing."""
        try:
            with self.io_ops.open_temporary(Path(path)) as file:
                stream = Stream(file, self.io_ops)
                yield stream
                stream.close()
        except Exception as error:
            self.problem = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
            raise
        self.written[Path(path).name] = (stream.length, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file of this rank."""
        self.io_ops.replace(Path(path), Path(new_path))
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


def save_parts(folder: Path, state: PartedState, *, is_newest: bool = True, io_ops: IoOps = IO_OPS) -> Path:
    """Write `step_XXXX/` completely or not at all, then `latest.json` if it is the newest; all ranks call this together.

    Raise ResourceError on every rank if a write fails on any, and TrainingError if a weight is not finite.
    """
    step: int = state.gather(state.skeleton.get("step"))[0]
    path = parts_path(folder, step)
    name = f".{path.name}.tmp.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = folder / state.gather(name)[0]
    try:
        with failing_together(state, path):
            if problem := find_wrong_weight({n: p.tensor for n, p in state.parts.items() if n.startswith(MODEL)}):
                what = f"was not saved: {problem}"
                raise TrainingError(path, what, "lower training.learning_rate and resume from the previous checkpoint")
            if state.rank == 0:
                temporary.mkdir(mode=0o700)
        files = write_parts(temporary, path, state, io_ops)
        with failing_together(state, path):
            if state.rank == 0:
                publish(temporary, path, state, files, io_ops)
                if is_newest:
                    hint: dict[str, str | int | float] = {"file": path.name, "step": step}
                    write_atomically(folder / LATEST, to_json(hint), io_ops=io_ops)
    except BaseException:
        if state.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def write_parts(temporary: Path, path: Path, state: PartedState, io_ops: IoOps) -> dict[str, tuple[int, str]]:
    """Write each rank's tensors, and read them back. Return the (size, SHA-256) of all ranks' files."""
    found = Files(io_ops)
    with failing_together(state, path):
        try:
            with without_a_warning():
                save(
                    dict(state.parts),
                    storage_writer=Writer(temporary, found),
                    planner=SavePlanner(),
                    process_group=state.group,
                    no_dist=state.group is None,
                )
        except CheckpointException as raised:  # on all ranks, with the error of each that failed
            own = raised.failures.get(state.rank, (None, None))[0]
            raise found.problem or own or AnotherRankFailed from None  # torch.save hides an OSError
        for name, (size, digest) in found.written.items():
            if (size, digest) != describe_file(temporary / name):
                raise ResourceError(path, f"was not saved: {name} was not written as it should be", "check the disk")
    return {name: one for written in state.gather(found.written) for name, one in written.items()}


def publish(temporary: Path, path: Path, state: PartedState, files: dict[str, tuple[int, str]], io_ops: IoOps) -> None:
    """Write state.pt and the manifest, and give the folder its name."""
    skeleton = temporary / SKELETON
    write_atomically(skeleton, lambda file: torch.save(state.skeleton, file), check=read_checked, io_ops=io_ops)  # type: ignore[arg-type]
    files = {**files, SKELETON: describe_file(skeleton)}
    listed = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    manifest = {"step": state.skeleton["step"], "files": listed}
    write_atomically(temporary / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode(), io_ops=io_ops)
    if path.exists():  # saved before by a run that was resumed from an older checkpoint
        shutil.rmtree(path)
    io_ops.replace(temporary, path)
    io_ops.fsync_dir(path.parent)


class AnotherRankFailed(Exception):
    """A save failed, though not on this rank."""


@contextlib.contextmanager
def failing_together(state: PartedState, path: Path) -> Iterator[None]:
    """Raise on every rank if the block raises on one: there its own error, elsewhere one that names that rank."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:  # also an interruption: the other ranks wait
        error = caught
    is_own = error is not None and not isinstance(error, AnotherRankFailed)
    problems = state.gather(f"{type(error).__name__}: {error}" if is_own else "")
    failed = [rank for rank, problem in enumerate(problems) if problem]
    if isinstance(error, OSError):
        what = f"was not saved: {error.strerror or error}"
        raise ResourceError(path, what, "free some space, make it writable, or choose another folder") from error
    if error is not None and is_own:
        raise error
    if failed:
        what = f"was not saved: rank {failed[0]} failed ({problems[failed[0]]})"
        raise ResourceError(path, what, "see the message of that rank")
