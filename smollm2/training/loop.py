"""A run from start to end: open what it needs, take the steps, save the model.

The loop's state between steps is `Progress`, which each checkpoint contains. The learning rate depends only on the
step, a batch on the seed and its number, and the random numbers of a sample on the seed, the step and the prompt. A run
that was killed and resumed is therefore bit-identical to one that was not.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smollm2.checkpoint.retention import move_superseded, recompute_best
from smollm2.config.schema import Config
from smollm2.data.batches import prefetched
from smollm2.data.windows import Batch
from smollm2.errors import DataError, Interrupted, ResourceError, Smollm2Error, TrainingError
from smollm2.plan.throughput import Duration
from smollm2.runtime.device import environment, start_runtime
from smollm2.runtime.random_state import restore_random_state
from smollm2.runtime.ranks import remove_positions
from smollm2.storage.locks import HeldFolder, lock_folder
from smollm2.storage.run_folder import REPORT, find_checkpoint
from smollm2.tracking.console import ConsoleTracker, RunLog, find_secrets
from smollm2.training.actions import (
    check_replicas,
    evaluate_before,
    is_due,
    run_actions,
    save,
    scheduled_actions,
    scheduled_diagnostics,
)
from smollm2.training.agreement import config_facts, fingerprint_code, refuse_disagreement, start_facts, watch_ranks
from smollm2.training.anomalies import report_anomaly, report_out_of_memory
from smollm2.training.autopsy import SpikeExaminer
from smollm2.training.corpus import share_corpus
from smollm2.training.first_step import check_first_step
from smollm2.training.memory import (
    MicroBatchChoice,
    choose_micro_batch,
    is_out_of_memory,
    micro_batch_size,
    no_room_for_one_sequence,
    smaller_micro_batch,
)
from smollm2.training.optim import learning_rate_at
from smollm2.training.pages import end_page, plan_run, report_baselines, report_end, report_start, start_page
from smollm2.training.preflight import preflight, record_preflight
from smollm2.training.progress import Progress
from smollm2.training.resume import check_changes, count_compared_windows, find_start, restore
from smollm2.training.rewind import Rewind, rewind
from smollm2.training.setup import (
    Run,
    Setup,
    build_run,
    check_disk,
    fit_vocabulary,
    open_trackers,
    settle_chat,
    settle_compilation,
    settle_sharding,
)
from smollm2.training.step import MicroBatchTooLarge, StepResult, rehearse, split, train_step
from smollm2.training.timing import (
    TIME_UP,
    Forecast,
    Meter,
    Stragglers,
    TimeLimit,
    own_seconds,
    save_throughput,
    signal_name,
    stopped,
)

REPLICA_INTERVAL = 1000
"""Steps between comparisons of the ranks' weights; each save compares them as well."""

OnStep = Callable[[int, StepResult], object]
"""A function that is called after each step with the step's number and result."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run. `best_validation_loss` is infinite if no loss was measured.

    `checkpoint_path` is the checkpoint of the last step.
    """

    step: int
    tokens: int
    loss: float
    best_validation_loss: float
    checkpoint_path: Path


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check and has not yet changed its run folder."""

    setup: Setup
    run: Run
    progress: Progress
    micro_batch: MicroBatchChoice
    checks: dict[str, Any] | None = None  # the content of doctor.json, if they were made


def train(
    config: Config,
    *,
    resume: str = "",
    checkpoint_path: str | Path | None = None,
    origins: Mapping[str, str] | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train according to `config`, and return the result of the run.

    `resume="auto"` resumes from the newest valid checkpoint in save_dir, if there is one; `checkpoint_path` names the
    checkpoint to resume from. `origins` says where each config value comes from, for the run folder's config.yaml. With
    `quiet`, nothing is printed. Raise a Smollm2Error for a problem that the user can fix, and its subclass Interrupted
    after a signal or at the time limit, once the run is saved.
    """
    limit = TimeLimit(config.training.time_limit)
    runtime = start_runtime(config.training)
    folder = Path(config.training.save_dir)
    log = RunLog(folder, runtime.rank, find_secrets(environment()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.stop.listening())
        watch = stack.enter_context(watch_ranks(config, runtime, log))
        is_silent = quiet or runtime.rank > 0
        stream = stack.enter_context(Path(os.devnull).open("w")) if is_silent else None
        setup = Setup(config, origins or {}, runtime, ConsoleTracker(config.training.train_steps, 0, stream, log))
        held = claim_folder(setup, stack)
        try:
            if runtime.world_size > 1:
                watch.start()
            prepared = check_before(prepare(setup, resume, checkpoint_path))
        except Smollm2Error:
            watch.close(0)  # all ranks fail together here, and none may write to a folder that is being removed
            with contextlib.suppress(RuntimeError):
                runtime.gather("leaving")
            if held:  # nothing was trained: remove the folder if this process created it
                held.discard()
            raise
        progress = prepared.progress
        if progress.step == config.training.train_steps and not progress.pending:
            setup.report(
                f"{folder}: all {progress.step} steps are done. To train more: --resume auto --train_steps "
                f"{2 * progress.step}"
            )
        else:
            progress = run_prepared(prepared, limit, log, on_step)
    if runtime.stop.number:  # the signal came during the last save, or while the trackers closed
        raise stopped(runtime.stop.number, progress.step)
    start, path = prepared.setup.start, find_checkpoint(folder, config.training.train_steps)
    path = start.path if start and start.step == progress.step else path
    return TrainingResult(progress.step, progress.tokens, progress.loss, progress.best_validation_loss, path)


def claim_folder(setup: Setup, stack: contextlib.ExitStack) -> HeldFolder | None:
    """Create and lock the run folder on rank 0. Raise ResourceError if it cannot be written to or is in use.

    In that case, the other ranks raise an error as well, and all end together.
    """
    config, runtime, held = setup.config, setup.runtime, None
    with runtime.together():
        micro_batch_size(config.global_batch_size, runtime.world_size, config.training.batch_size)
        if runtime.rank == 0:
            held = stack.enter_context(lock_folder(setup.folder))
            remove_positions(setup.folder)
            if not held.is_exclusive:
                setup.report(
                    f"{setup.folder}: this file system has no locks. Make sure that no other run writes there."
                )
    return held


def prepare(setup: Setup, resume: str, checkpoint_path: str | Path | None) -> Prepared:
    """Open and check everything that the run needs, without changing anything in the run folder."""
    runtime = setup.runtime
    refuse_disagreement(runtime, {"the code": fingerprint_code(), **config_facts(setup.config)})
    with runtime.together():
        setup = dataclasses.replace(setup, start=find_start(setup, resume, checkpoint_path))
    corpus = share_corpus(setup)
    refuse_disagreement(runtime, start_facts(setup, corpus))
    setup = settle_sharding(settle_compilation(settle_chat(fit_vocabulary(setup, corpus.tokenizer), corpus)))
    runtime = setup.runtime
    with runtime.together():
        if setup.start:
            check_changes(setup, setup.start, corpus)
        if runtime.rank == 0:
            check_disk(setup.config, setup.folder)
        run = build_run(setup, corpus)
        progress = restore(run, setup.start) if setup.start else Progress()
        run = dataclasses.replace(run, batches=run.batches.skipping(progress.skips))
        micro_batch = choose_micro_batch(setup.config, runtime)
    run = dataclasses.replace(run, prepared=runtime.prepare_model(run.model))
    if runtime.world_size > 1 and runtime.device.type == "cuda" and not runtime.layout.is_sharded:
        micro_batch = rehearse(run.prepared, setup.config, runtime, micro_batch)
    return Prepared(setup, run, progress, micro_batch)


def check_before(prepared: Prepared) -> Prepared:
    """Return the prepared run with the results of its preflight. Raise TrainingError if a check fails."""
    run, setup, checks = prepared.run, prepared.setup, None
    if run.config.training.preflight:
        checks = preflight(run, setup.console)
    if number := run.runtime.stop_requested():
        raise Interrupted(f"stopped by {signal_name(number)} before training began; nothing was lost", number)
    return dataclasses.replace(prepared, checks=checks)


def run_prepared(prepared: Prepared, limit: TimeLimit, log: RunLog, on_step: OnStep | None) -> Progress:
    """Run the remaining steps and return the progress after them. If they end early, raise an error with the reason."""
    setup, run = prepared.setup, prepared.run
    try:
        with contextlib.ExitStack() as trackers:
            run, announced = begin(prepared, trackers)
            started = time.perf_counter()
            try:
                evaluate_before(run, prepared.progress, prepared.micro_batch.size)
                progress = run_all_steps(run, prepared.progress, prepared.micro_batch.size, limit, announced, on_step)
            except Exception as error:
                report_end(run, error)
                raise
            seconds = time.perf_counter() - started
            setup.console.show_page("Done", end_page(run, progress, seconds))
            run.tracker.log_event("done", "", progress.step, seconds=round(seconds, 3))
        return progress
    except Interrupted as error:
        log.write(str(error))
        if (run.folder / REPORT).exists():
            setup.report(f"report: {run.folder / REPORT}")
        raise
    except Exception as error:
        log.write_error(error)
        raise explain_failure(error, setup, log) from error


def begin(prepared: Prepared, stack: contextlib.ExitStack) -> tuple[Run, Duration]:
    """Make the first changes to the run folder, now that the next step is about to run, and show the start page.

    Return the run with its trackers, and the announced duration.
    """
    setup, run, progress = prepared.setup, prepared.run, prepared.progress
    # Before the later rows are removed: a kill in between must not leave a newer checkpoint without its rows.
    moved = move_superseded(run.folder, progress.step) if run.runtime.rank == 0 else []
    if run.runtime.rank == 0:
        recompute_best(run.folder, count_compared_windows(run.config, run.validation))
    run = open_trackers(run, setup, stack)
    if moved:
        setup.report(
            f"moved to {moved[0].parent}, because the run resumes before them: {', '.join(p.name for p in moved)}"
        )
    report_start(run, progress, setup.start)
    record_preflight(run, prepared.checks)
    if prepared.micro_batch.reason:
        run.tracker.log_event("micro_batch", prepared.micro_batch.reason, progress.step)
    plan = plan_run(run)
    baselines = report_baselines(run, progress.step)
    setup.console.show_page("SmolLM2 Training", start_page(run, progress, plan, baselines))
    if setup.start:  # last: nothing may draw a random number between this and the first step
        restore_random_state(setup.start.state["rng"])
    return run, plan.duration


def explain_failure(error: Exception, setup: Setup, log: RunLog) -> Exception:
    """Return the error as it is shown to the user, with the log's path, the rank concerned or the setting to change."""
    if isinstance(error, TrainingError):
        return TrainingError(f"{error} The details are in {log.path}.")
    if is_out_of_memory(error):
        error = ResourceError(
            "training.batch_size",
            f"{setup.config.training.batch_size} is too large: out of memory",
            "lower it, and raise training.gradient_accumulation_steps by the same factor; the checkpoints are intact",
        )
        error.rank = setup.runtime.rank
    if isinstance(error, DataError):  # each rank reads its own windows
        error.rank = setup.runtime.rank
    return error


def run_all_steps(
    run: Run, progress: Progress, size: int, limit: TimeLimit, announced: Duration, on_step: OnStep | None
) -> Progress:
    """Call `run_steps` until the last step is done; after a rewind, again from the checkpoint."""
    while True:
        try:
            return run_steps(run, progress, size, limit, announced, on_step)
        except Rewind as request:
            run, progress = rewind(run, request)


def run_steps(
    run: Run, progress: Progress, size: int, limit: TimeLimit, announced: Duration, on_step: OnStep | None
) -> Progress:
    """Train from `progress` to the last step, in micro-batches of up to `size` sequences.

    Raise Interrupted after a signal or at the time limit, and TrainingError for numerical failures.
    """
    t, runtime = run.config.training, run.runtime
    share = run.config.global_batch_size // runtime.world_size
    first_row = runtime.rank * share
    meter, forecast, stragglers = Meter(), Forecast(announced), Stragglers()
    with contextlib.closing(prefetched(run.batches, progress.step, first_row, first_row + share)) as batches:
        while progress.pending or progress.step < t.train_steps:
            runtime.pulse.step = progress.step + 1
            limit.begin_step()
            if not progress.pending:  # else a signal had interrupted the actions of the last step, and they come first
                before = own_seconds(runtime)
                result, progress, size = make_step(run, progress, next(batches), size)
                meter.add(result, own_seconds(runtime) - before)
                if correction := forecast.add(result.seconds, t.train_steps - progress.step):
                    run.tracker.log_event("estimate", correction, progress.step)
                report_anomaly(run, progress, result)
                check_first_step(run, progress.step, result, size)
                if progress.step == 1 or is_due(progress.step, t.log_interval, is_last=progress.step == t.train_steps):
                    row = describe_step(run, progress, result, meter) | stragglers.compare(run, meter)
                    run.tracker.log(row, progress.step)
                if on_step:
                    on_step(progress.step, result)
            if run.saver:
                run.saver.report_finished()
            progress, validation_loss = run_actions(run, progress, size)
            end_step(run, progress, validation_loss, limit, meter)
    return progress


def make_step(run: Run, progress: Progress, batch: Batch, size: int) -> tuple[StepResult, Progress, int]:
    """Take one step, with diagnostics if due; return its result, the new progress and the micro-batch size used."""
    step = progress.step + 1
    diagnostics = scheduled_diagnostics(run, step)
    result, size = step_within_memory(run, progress, batch, size, diagnostics)
    progress = progress.after(result)
    if diagnostics:
        diagnostics.log(progress, split(batch, size, run.runtime)[0])
        progress = dataclasses.replace(progress, clipped=(0, 0))
    return result, dataclasses.replace(progress, pending=scheduled_actions(run, step)), size


def step_within_memory(
    run: Run, progress: Progress, batch: Batch, size: int, diagnostics: contextlib.AbstractContextManager[object] | None
) -> tuple[StepResult, int]:
    """Take the next step in micro-batches of up to `size` sequences, or smaller ones if memory runs out.

    Return its result and the size that was used. Raise ResourceError if not even one sequence fits.
    """
    t, runtime, step = run.config.training, run.runtime, progress.step + 1
    while True:
        micro_batches = split(batch, size, runtime)
        with contextlib.suppress(MicroBatchTooLarge):
            result = train_step(
                run.prepared,
                run.optimizers,
                micro_batches,
                runtime,
                learning_rate=learning_rate_at(step - 1, t),
                max_grad_norm=t.max_grad_norm,
                z_loss=t.z_loss,
                diagnostics=diagnostics,
                examiner=SpikeExaminer(run, progress, micro_batches, size),
            )
            return result, size
        smaller = smaller_micro_batch(len(batch.input_ids), size)
        if smaller is None:
            raise no_room_for_one_sequence(run.config)
        report_out_of_memory(run, step, size, smaller)
        size = smaller
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def describe_step(run: Run, progress: Progress, result: StepResult, meter: Meter) -> dict[str, float | int]:
    """Return the metrics row of a step; everything but tokens_per_second depends only on the config and the step."""
    return {
        "tokens": progress.tokens,
        "epoch": run.batches.epoch_of(progress.step),
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "skipped": len(progress.skipped),
        "tokens_per_second": meter.take_tokens_per_second(),
    }


def end_step(run: Run, progress: Progress, validation_loss: float | None, limit: TimeLimit, meter: Meter) -> None:
    """Save a checkpoint if it is due. After a signal or at the time limit, save one and raise Interrupted."""
    t, runtime, step = run.config.training, run.runtime, progress.step
    is_last = step == t.train_steps
    save_seconds = run.saver.seconds if run.saver else 0.0
    time_is_up = limit.is_up(2 * save_seconds) and not is_last
    stop = runtime.stop_requested(TIME_UP if time_is_up else 0)
    if stop or is_due(step, t.save_interval, is_last=is_last):
        save(run, progress, validation_loss, must_succeed=is_last or stop > 0)
    elif is_due(step, REPLICA_INTERVAL, is_last=is_last):
        check_replicas(run, step)
    if stop or is_last:
        save_throughput(run, meter)
    if stop and (progress.pending or not is_last):
        raise stopped(stop, step)
