"""A run, from the first line to the last: open what it needs, make the updates, leave a model behind.

What the loop remembers between two updates is `Progress`, saved whole; the rate is a function of the step, a batch of
the seed and its number, a sample of the seed and the step. So a run that was killed and resumed goes on bit for bit.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from smollm2.analysis.diagnostics import Look
from smollm2.checkpoint.retention import set_aside_later
from smollm2.config.schema import Config
from smollm2.data.batches import prefetched
from smollm2.data.windows import Batch
from smollm2.errors import (
    DataError,
    Interrupted,
    ResourceError,
    Smollm2Error,
    TrainingError,
)
from smollm2.plan.throughput import Duration
from smollm2.runtime.device import (
    environment,
    start_runtime,
)
from smollm2.storage.locks import HeldFolder, lock_folder
from smollm2.tracking.console import ConsoleTracker, RunLog, find_secrets
from smollm2.training.actions import begin_look, check_replicas, do_duties, due, duties_of, end_look, save, split
from smollm2.training.agreement import config_facts, fingerprint_code, refuse_disagreement, start_facts, watched
from smollm2.training.anomalies import note_out_of_memory, note_trouble
from smollm2.training.corpus import share_corpus
from smollm2.training.memory import choose_micro_batch, describe_out_of_memory
from smollm2.training.optim import learning_rate_at
from smollm2.training.pages import end_page, note_start, note_stop, plan_run, start_page
from smollm2.training.progress import Progress
from smollm2.training.resume import find_start, restore
from smollm2.training.setup import Run, open_run
from smollm2.training.step import (
    MicroBatchTooLarge,
    StepResult,
    micro_batch_size,
    rehearse,
    smaller_micro_batch,
    update,
)
from smollm2.training.timing import Clock, Meter, correct_time, save_throughput

REPLICA_INTERVAL = 1000
"""Updates between two comparisons of the ranks' weights; each save compares them as well."""


TIME_UP = 1000
"""Stands among the numbers of signals for the end of the run's own time."""


def train(
    config: Config,
    *,
    resume: str = "",
    checkpoint_path: str | Path | None = None,
    origins: Mapping[str, str] | None = None,
) -> Progress:
    """Train as `config` says, and return where the run ended.

    `resume="auto"` goes on from the newest valid checkpoint in save_dir, if there is one; `checkpoint_path` from that
    one. `origins` says where each value came from, for the run folder's config.yaml. Raises a Smollm2Error for what a
    user can mend, among them Interrupted after a signal or at the time limit, when the run is saved.
    """
    clock = Clock(config.training.time_limit)
    runtime = start_runtime(config.training)
    folder = Path(config.training.save_dir)
    held: HeldFolder | None = None
    log = RunLog(folder, runtime.rank, find_secrets(environment()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.stop.listening())
        watch = stack.enter_context(watched(config.training, runtime, log))
        quiet = None if runtime.rank == 0 else stack.enter_context(Path(os.devnull).open("w"))
        console = ConsoleTracker(config.training.train_steps, 0, quiet, log)
        try:
            with runtime.together():
                micro_batch_size(config.global_batch_size, runtime.world_size, config.training.batch_size)
                if runtime.rank == 0:
                    held = stack.enter_context(lock_folder(folder))
                    if not held.is_exclusive:
                        console.say(f"{folder}: this file system has no locks; take care that no other run writes here")
            if runtime.world_size > 1:
                watch.start()
            refuse_disagreement(runtime, {"the code": fingerprint_code(), **config_facts(config)})
            with runtime.together():
                start = find_start(folder, resume, checkpoint_path, console)
            tokenizer, store = share_corpus(config, runtime, start, origins or {}, console)
            refuse_disagreement(runtime, start_facts(runtime, start, tokenizer, store))
            with runtime.together():
                run = open_run(config, runtime, start, tokenizer, store, origins or {}, console, stack)
                progress = restore(run, *start) if start else Progress()
            run = dataclasses.replace(run, prepared=runtime.prepare_model(run.model))
            size = choose_micro_batch(run)
            if number := runtime.stop_requested():
                raise Interrupted(f"stopped by {signal.Signals(number).name} before a step; nothing was lost", number)
        except Smollm2Error:
            if held:  # nothing was trained: leave nothing behind
                held.discard()
            stack.close()
            raise
        if progress.step == config.training.train_steps and not progress.pending:
            more = f"--resume auto --train_steps {2 * progress.step}"
            console.say(f"{folder}: all {progress.step} updates are done; for more: {more}")
            return progress
        if runtime.rank == 0 and (aside := set_aside_later(folder, progress.step)):
            console.say(f"set aside, since the run goes on from before them: {', '.join(path.name for path in aside)}")
        started = time.perf_counter()
        plan = plan_run(run)
        console.show_page("SmolLM2 Training", start_page(run, progress, plan))
        note_start(run, progress)
        try:
            progress = run_steps(run, progress, size, clock, plan.duration)
        except Exception as error:
            log.write_error(error)
            note_stop(run, error)
            if isinstance(error, DataError):  # each rank reads windows of its own
                error.rank = runtime.rank
            if isinstance(error, TrainingError):
                raise TrainingError(f"{error} ({log.path})") from None
            if isinstance(error, torch.OutOfMemoryError):
                short = ResourceError(
                    f"training.batch_size: {config.training.batch_size} - out of memory - lower it, and raise "
                    "training.gradient_accumulation_steps by as much; the checkpoints are intact"
                )
                short.rank = runtime.rank
                raise short from None
            raise
        seconds = time.perf_counter() - started
        console.show_page("Done", end_page(run, progress, seconds))
        run.tracker.log_event("done", "", progress.step, seconds=round(seconds, 3))
        stack.close()
        if runtime.stop.number:  # it came during the last save, or while the trackers closed
            raise_stopped(runtime.stop.number, progress.step)
    return progress


def raise_stopped(number: int, step: int) -> NoReturn:
    """Raises Interrupted, by a signal or by TIME_UP, with the step that is saved."""
    if number == TIME_UP:
        raise Interrupted(f"training.time_limit is reached after step {step}, which is saved", 0)
    raise Interrupted(f"stopped by {signal.Signals(number).name} after step {step}, which is saved", number)


def run_steps(run: Run, progress: Progress, size: int, clock: Clock, announced: Duration) -> Progress:
    """From `progress` to the last step, in micro-batches of `size`. Raises Interrupted after a signal or at the time
    limit, TrainingError where the numbers fail."""
    t, runtime, tracker = run.config.training, run.runtime, run.tracker
    meter, share = Meter(), run.config.global_batch_size // runtime.world_size
    first_row = runtime.rank * share
    with contextlib.closing(prefetched(run.batches, progress.step, first_row, first_row + share)) as batches:
        while progress.pending or progress.step < t.train_steps:
            runtime.pulse.step = progress.step + 1
            clock.begin_step()
            if not progress.pending:  # else a signal cut this step's duties short, and they come first
                batch, look = next(batches), begin_look(run, progress.step + 1)
                result, size = update_or_shrink(run, progress.step, batch, size, look)
                progress = end_look(run, progress.after(result), look, batch, size)
                progress = dataclasses.replace(progress, pending=duties_of(run, progress.step))
                meter.add(result)
                correct_time(run, progress, meter, announced)
                note_trouble(run, progress, result)
                if progress.step == 1 or due(progress.step, t.log_interval, progress.step == t.train_steps):
                    tracker.log(report(run, progress, result, meter), progress.step)
            step, last = progress.step, progress.step == t.train_steps
            if run.saver:
                run.saver.note_finished()
            progress, validation_loss = do_duties(run, progress, size)
            save_seconds = run.saver.seconds if run.saver else 0.0
            time_up = clock.is_up(2 * save_seconds) and not last
            stop = runtime.stop_requested(TIME_UP if time_up else 0)
            if stop or due(step, t.save_interval, last):
                check_replicas(run, step)
                save(run, progress, validation_loss, must_succeed=last or bool(stop))
            elif due(step, REPLICA_INTERVAL, last):
                check_replicas(run, step)
            if stop or last:
                save_throughput(run, meter)
            if stop and (progress.pending or not last):
                raise_stopped(stop, step)
    return progress


def update_or_shrink(run: Run, step: int, batch: Batch, size: int, look: Look | None) -> tuple[StepResult, int]:
    """Update `step` + 1 in micro-batches of `size`, or from its beginning in smaller ones where memory runs out; and of
    how many. Raises ResourceError where one sequence at once is too much."""
    t, runtime = run.config.training, run.runtime
    while True:
        with contextlib.suppress(MicroBatchTooLarge):
            if step == run.resumed_step and runtime.world_size > 1 and runtime.device.type == "cuda":
                rehearse(run.prepared, split(batch, size, runtime)[0], runtime)
            result = update(
                run.prepared,
                run.optimizers,
                split(batch, size, runtime),
                runtime,
                learning_rate=learning_rate_at(step, t),
                max_grad_norm=t.max_grad_norm,
                z_loss=t.z_loss,
                look=look,
            )
            return result, size
        smaller = smaller_micro_batch(len(batch.input_ids), size)
        if smaller is None:
            raise ResourceError(describe_out_of_memory(run.config, 1))
        note_out_of_memory(run, step + 1, size, smaller)
        size = smaller
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def report(run: Run, progress: Progress, result: StepResult, meter: Meter) -> dict[str, float | int]:
    """The row of one update; everything but tokens_per_second is the same whenever and wherever it is computed again."""
    return {
        "tokens": progress.tokens,
        "epoch": run.batches.epoch_of(progress.step),
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "skipped": len(progress.skipped),
        "tokens_per_second": meter.take(),
    }
