"""Write checkpoints while training continues: the state is copied, and a thread writes it, reads it back and checks it.

The main thread reports the outcome after the first step at which the save has ended, or at the next save at the latest.
If there is too little memory to copy the state, or if the save must succeed, the run waits for it.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.checkpoint.format import State, estimate_size, separate_ties, take_snapshot, to_plain
from smollm2.checkpoint.parts import PartedState
from smollm2.checkpoint.retention import prune_checkpoints, record_best, to_json
from smollm2.checkpoint.validation import find_wrong_entry, find_wrong_weight, read_checked
from smollm2.config.schema import Config
from smollm2.errors import CheckpointError, ResourceError, Smollm2Error, TrainingError
from smollm2.plan.machine import available_memory
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically
from smollm2.storage.run_folder import (
    LATEST,
    checkpoint_path,
    find_checkpoint,
    is_checkpoint,
    next_step_path,
    step_of,
)
from smollm2.tracking.base import Fanout
from smollm2.tracking.jsonl import JsonlTracker

MAX_FAILED_SAVES = 3
THREAD_NAME = "checkpoint"


@dataclass(frozen=True)
class Saved:
    """The result of a save: the checkpoint's path, and whether its validation loss is the lowest so far."""

    path: Path
    is_best: bool


class Saver:
    """Writes the checkpoints of one run: files on rank 0, or folders on all ranks together, which then have no `rows`.

    `seconds` is the duration of the longest save so far.
    """

    def __init__(self, config: Config, rows: JsonlTracker | None, tracker: Fanout) -> None:
        self.config, self.folder, self.rows, self.tracker = config, Path(config.training.save_dir), rows, tracker
        self.buffers: dict[str, Tensor] = {}
        self.pending: Future[Saved] | None = None
        self.next_step: Future[None] | None = None  # writes the record of the step after the checkpoint
        self.step, self.failures, self.seconds = -1, 0, 0.0

    def save(
        self,
        state: State | PartedState,
        validation_loss: float | None,
        *,
        windows: int,
        spikes: tuple[int, ...],
        resumed_step: int,
        must_succeed: bool,
    ) -> None:
        """Start writing the checkpoint; afterwards remove older checkpoints according to keep_last and keep_every.

        The last checkpoint before each step in `spikes` and the one at `resumed_step` are kept. `validation_loss` was
        measured on `windows` windows. If a save fails, for example because the disk is full, this is reported and the
        run continues until the next save. Raise ResourceError if this save must succeed and fails, or if it is the
        third in a row that fails.
        """
        self.finish()
        must_succeed = must_succeed or self.failures + 1 == MAX_FAILED_SAVES
        if self.rows:
            self.rows.sync()
        waits = must_succeed or not (self.buffers or has_room_for_copy(state))
        if isinstance(state, PartedState):
            self.step = state.skeleton["step"]
            state = state if waits else state.copy(self.buffers)
        else:
            self.step = state["step"]
            state = state if waits else take_snapshot(state, self.buffers)
        # Each save has a new thread. OpenMP would count a permanent one among its workers and let all of them sleep
        # between operations: every small operation would take 28 us instead of 8 (measured 2026-11).
        thread = ThreadPoolExecutor(1, THREAD_NAME)
        self.pending = thread.submit(self._write, state, validation_loss, windows, {resumed_step}, spikes)
        thread.shutdown(wait=False)
        if waits:
            self.finish(must_succeed=must_succeed)

    def report_finished(self) -> None:
        """Report the outcome of the pending save if it has ended, without waiting for it."""
        if self.pending and self.pending.done() and (self.next_step is None or self.next_step.done()):
            self.finish()

    def record_next_step(self, step: int, describe: Callable[[], Mapping[str, object]]) -> None:
        """Write what `describe` returns, about the step after the checkpoint of `step`, beside it, once it is saved.

        A thread calls `describe` and writes the file. Without it the checkpoint is as good, so a failure is not reported.
        """
        pending = self.pending

        def write() -> None:
            if pending:
                wait([pending])
            path = find_checkpoint(self.folder, step)
            if is_checkpoint(path):
                with contextlib.suppress(Smollm2Error):
                    write_atomically(next_step_path(path), to_json(describe()))

        thread = ThreadPoolExecutor(1, THREAD_NAME)
        self.next_step = thread.submit(write)
        thread.shutdown(wait=False)

    def finish(self, *, must_succeed: bool = False) -> None:
        """Wait for the pending save and report its outcome. With `must_succeed`, raise ResourceError if it failed."""
        if self.next_step:  # else the next save could remove the checkpoint before its record is written
            wait([self.next_step])
            self.next_step = None
        if self.pending is None:
            return
        work, self.pending = self.pending, None
        try:
            saved = work.result()
        except ResourceError as error:
            self.failures += 1
            self.tracker.log_event("save_failed", str(error), self.step)
            if must_succeed:
                raise
            return
        self.failures = 0
        self.tracker.log_event("checkpoint", f"saved {saved.path}", self.step, path=str(saved.path))
        self.tracker.save_file(saved.path, self.step, is_best=saved.is_best)

    def _write(
        self,
        state: State | PartedState,
        validation_loss: float | None,
        windows: int,
        protected: set[int],
        spikes: tuple[int, ...],
    ) -> Saved:
        began, t = time.monotonic(), self.config.training
        path = save_state(self.folder, state)
        if self.rows is None:
            return Saved(path, False)
        is_best = validation_loss is not None and record_best(self.folder, path, validation_loss, windows=windows)
        if t.keep_last is not None:
            before_spikes = {step_of(path) for s in spikes for path in list_before(self.folder, s)[-1:]}
            prune_checkpoints(self.folder, t.keep_last, t.keep_every, protected=protected | before_spikes)
        self.seconds = max(self.seconds, time.monotonic() - began)
        return Saved(path, is_best)


def save_state(folder: Path, state: State | PartedState, *, is_newest: bool = True, io_ops: IoOps = IO_OPS) -> Path:
    """Write a checkpoint: a folder if each rank has a part of the state, else a file; `latest.json` if it is the newest."""
    if isinstance(state, PartedState):
        from smollm2.checkpoint.parts_saving import save_parts  # it imports DCP, which a file does not need

        return save_parts(folder, state, is_newest=is_newest, io_ops=io_ops)
    return save_checkpoint(folder, state, step=state["step"], is_newest=is_newest, io_ops=io_ops)


def save_checkpoint(folder: Path, state: State, *, step: int, is_newest: bool = True, io_ops: IoOps = IO_OPS) -> Path:
    """Write `step_XXXX.pt`, then `latest.json`, each atomically; the checkpoint is read back before it gets this name.

    `state` may be a snapshot from `take_snapshot`. Raise ResourceError if the write fails (older files stay intact),
    TrainingError if a weight is not finite, and TypeError, a bug in the caller, if the state is not made of plain
    values.
    """
    content = state
    if "tied" not in state:
        model, tied = separate_ties(state["model"])
        content = to_plain({**state, "model": model, "tied": tied}, "state")
    problem = find_wrong_entry(content)
    if problem or content["step"] != step:
        raise TypeError(problem or f"the state is of step {content['step']}, not {step}")
    path = checkpoint_path(folder, step)
    if problem := find_wrong_weight(content["model"]):
        raise TrainingError(
            path, f"was not saved: {problem}", "lower training.learning_rate and resume from the previous checkpoint"
        )
    hint: dict[str, str | int] = {"file": path.name, "step": step}

    def check(temporary: Path) -> None:
        try:
            read_checked(temporary)
        except CheckpointError as error:
            raise ResourceError(
                path,
                f"was not saved, because the written file failed its check: {error}",
                "check the disk; the earlier checkpoints are intact",
            ) from error
        with temporary.open("rb") as file:
            hint["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        hint["size"] = temporary.stat().st_size

    # torch.save calls only `write` and `flush` of a file.
    write_atomically(
        path,
        lambda file: torch.save(content, file),  # type: ignore[arg-type]
        size=estimate_size(content),
        check=check,
        io_ops=io_ops,
    )
    if is_newest:
        write_atomically(folder / LATEST, to_json(hint), io_ops=io_ops)
    return path


def list_before(folder: Path, step: int) -> list[Path]:
    """Return the checkpoints before step `step`, oldest first."""
    return [path for path in list_checkpoints(folder) if step_of(path) < step]


def has_room_for_copy(state: State | PartedState) -> bool:
    """Return whether this machine has enough memory available for two copies of the state."""
    held = [part.tensor for part in state.parts.values()] if isinstance(state, PartedState) else state
    return 2 * count_bytes(held) <= available_memory()


def count_bytes(value: object) -> int:
    """Return the total size in bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(count_bytes, value.values()))
    return sum(map(count_bytes, value)) if isinstance(value, list | tuple) else 0
