"""Rewind a run to the newest checkpoint before a spike, and leave out the batches from there to the spike."""

import dataclasses

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.saving import list_before
from smollm2.errors import CheckpointError
from smollm2.runtime.random_state import restore_random_state
from smollm2.training.actions import save
from smollm2.training.progress import Progress
from smollm2.training.resume import restore
from smollm2.training.setup import Run, Start

MAX_REWINDS = 3


class Rewind(Exception):
    """A step had a spike, and the run returns to `start`. `progress` is that of the spike's step."""

    def __init__(self, start: Start, progress: Progress) -> None:
        super().__init__(f"rewind from step {progress.step} to step {start.step}")
        self.start, self.progress = start, progress


def count_rewinds(progress: Progress) -> int:
    """Return how often the run has rewound."""
    return len(progress.skips) // 2


def find_rewind(run: Run, step: int) -> Start | None:
    """Return the newest valid checkpoint before `step` in the run folder, the same on all ranks, or None."""
    if run.saver:
        run.saver.finish()  # it may be the last checkpoint before the spike
    found: Start | None = None
    with run.runtime.together():
        for path in reversed(list_before(run.folder, step)):
            try:
                found = Start(path, load_checkpoint(path))
                break
            except CheckpointError:
                continue
    steps = run.runtime.gather(found.step if found else -1)
    return found if found and steps == [found.step] * len(steps) else None


def rewind(run: Run, request: Rewind) -> tuple[Run, Progress]:
    """Restore the checkpoint, and return the run that leaves out the batches after it up to the spike's.

    The checkpoint is saved again with the batches that are left out, so that a resume from it leaves them out as well.
    """
    start, spike = request.start, request.progress
    progress = restore(run, start)
    skips = (*spike.skips, start.step, spike.step - start.step)
    progress = dataclasses.replace(progress, skips=skips)
    restore_random_state(start.state["rng"])
    if run.saver and run.saver.rows:
        run.saver.rows.rewind(start.step)
    run = dataclasses.replace(run, batches=run.batches.skipping(skips), resumed_from=None)
    run.tracker.log_event(
        "rewind",
        f"step {spike.step}: rewound to {start.path.name}; the {spike.step - start.step} batches from there to the spike "
        f"are left out (rewind {count_rewinds(progress)} of at most {MAX_REWINDS})",
        start.step,
        spike_step=spike.step,
    )
    if not run.saves_folders:
        save(run, progress, None, must_succeed=False)
    return run, progress
