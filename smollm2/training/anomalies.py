"""Reports of steps with a problem: a loss or gradient that is not finite, a loss spike, too little memory."""

from typing import NoReturn

from smollm2.checkpoint.saving import list_before
from smollm2.errors import TrainingError
from smollm2.training.actions import save
from smollm2.training.memory import describe_smaller_batch
from smollm2.training.progress import SPIKE_WINDOW, Progress, too_many_skips
from smollm2.training.rewind import MAX_REWINDS, Rewind, count_rewinds, find_rewind
from smollm2.training.setup import Run
from smollm2.training.spike_events import add_update_norms
from smollm2.training.step import StepResult


def report_anomaly(run: Run, progress: Progress, result: StepResult) -> None:
    """Report a skipped step or a spike. Raise TrainingError if the run must stop, and Rewind if it must go back."""
    if result.spike:
        report_spike(run, progress, result)
    elif result.skipped:
        report_skip(run, progress, result)


def report_spike(run: Run, progress: Progress, result: StepResult) -> None:
    """Report a spike, and which checkpoint before it is kept; then follow training.on_spike."""
    step, policy = progress.step, run.config.training.on_spike
    if run.saver:
        run.saver.finish()  # it may be the last checkpoint before the spike
    before = [path.name for path in list_before(run.folder, step)]
    kept = f"{before[-1]} is kept" if before else "there is no checkpoint before it"
    number = f"the loss {result.loss:g}" if result.spike == "loss" else f"the gradient norm {result.grad_norm:g}"
    run.tracker.log_event(
        "spike",
        f"step {step}: {number} is far above those of the last {SPIKE_WINDOW} steps; {kept}",
        step,
        windows=run.batches.window_ids(step - 1).tolist(),
    )
    if not result.skipped and run.runtime.rank == 0:
        add_update_norms(run, step)
    if policy == "rewind":
        rewind_or_stop(run, progress)
    reason = too_many_skips(progress.skipped, step, fp16=run.runtime.scaler.is_enabled()) if policy != "keep" else None
    if policy == "stop":
        reason = f"{number} is a spike, and training.on_spike is stop"
    if reason:
        stop_run(run, progress, reason, "lower training.learning_rate, or set training.on_spike to skip")


def report_skip(run: Run, progress: Progress, result: StepResult) -> None:
    """Report a skipped step. If the run must stop, save a checkpoint and raise TrainingError; Rewind if it must rewind."""
    step, fp16 = progress.step, run.runtime.scaler.is_enabled()
    numbers = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    windows = run.batches.window_ids(step - 1).tolist()
    run.tracker.log_event(
        "skip", f"step {step}: not finite ({numbers}); the weights are unchanged", step, windows=windows
    )
    if run.config.training.on_nonfinite == "rewind" and not fp16:
        rewind_or_stop(run, progress)
    reason = too_many_skips(progress.skipped, step, fp16=fp16)
    if reason is None and run.config.training.on_nonfinite == "stop" and not fp16:
        reason = f"the loss or the gradient is not finite ({numbers}), and training.on_nonfinite is stop"
    if reason:
        stop_run(run, progress, reason, "lower training.learning_rate, or use training.precision float32")


def rewind_or_stop(run: Run, progress: Progress) -> None:
    """Raise Rewind to the newest checkpoint before this step, or TrainingError if the run has rewound too often.

    If there is no checkpoint, the step was only skipped.
    """
    if count_rewinds(progress) >= MAX_REWINDS:
        reason = f"it has a problem again after {MAX_REWINDS} rewinds"
        stop_run(run, progress, reason, "lower training.learning_rate, or look at the documents in events/")
    start = find_rewind(run, progress.step)
    if start:
        raise Rewind(start, progress)
    text = f"step {progress.step}: skipped instead of rewound, because there is no checkpoint before it"
    run.tracker.log_event("rewind", text, progress.step)


def stop_run(run: Run, progress: Progress, reason: str, advice: str) -> NoReturn:
    """Save a checkpoint, and raise TrainingError."""
    save(run, progress, None, must_succeed=True)
    raise TrainingError(f"step {progress.step}", f"{reason}; the run was saved at this step", advice)


def report_out_of_memory(run: Run, step: int, size: int, smaller: int) -> None:
    """Report that a step restarts with smaller micro-batches, and which settings would start a run with them."""
    message = (
        f"step {step}: out of memory with {size} sequences at once. Continuing with {smaller} at once; the step keeps its "
        f"{run.config.global_batch_size} sequences. To start that way, {describe_smaller_batch(run.config, smaller)}."
    )
    run.tracker.log_event("out_of_memory", message, step)
