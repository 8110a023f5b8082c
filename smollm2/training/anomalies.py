"""Reports of steps with a problem: a loss or gradient that is not finite, a loss spike, too little memory."""

from smollm2.checkpoint.saving import list_before
from smollm2.errors import TrainingError
from smollm2.training.actions import save
from smollm2.training.memory import describe_smaller_batch
from smollm2.training.progress import SPIKE_WINDOW, Progress, too_many_skips
from smollm2.training.setup import Run
from smollm2.training.step import StepResult


def report_anomaly(run: Run, progress: Progress, result: StepResult) -> None:
    """Report a skipped step or a loss spike, with the windows in its batch. Raise TrainingError like `report_skip`."""
    if result.skipped:
        report_skip(run, progress, result)
    elif progress.step in progress.spikes[-1:]:
        report_spike(run, progress.step, result)


def report_spike(run: Run, step: int, result: StepResult) -> None:
    """Report a loss spike, and which checkpoint before it is kept."""
    if run.saver:
        run.saver.finish()  # it may be the last checkpoint before the spike
    before = [path.name for path in list_before(run.folder, step)]
    kept = f"{before[-1]} is kept" if before else "there is no checkpoint before it"
    run.tracker.log_event(
        "spike",
        f"step {step}: the loss {result.loss:g} is far above those of the last {SPIKE_WINDOW} steps; {kept}",
        step,
        windows=run.batches.window_ids(step - 1).tolist(),
    )


def report_skip(run: Run, progress: Progress, result: StepResult) -> None:
    """Report a skipped step. If the run must stop, save a checkpoint and raise TrainingError."""
    step, fp16 = progress.step, run.runtime.scaler.is_enabled()
    numbers = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    windows = run.batches.window_ids(step - 1).tolist()
    run.tracker.log_event(
        "skip", f"step {step}: not finite ({numbers}); the weights are unchanged", step, windows=windows
    )
    reason = too_many_skips(progress.skipped, step, fp16=fp16)
    if reason is None and run.config.training.on_nonfinite == "stop" and not fp16:
        reason = f"the loss or the gradient is not finite ({numbers}), and training.on_nonfinite is stop"
    if reason:
        save(run, progress, None, must_succeed=True)
        raise TrainingError(
            f"step {step}",
            f"{reason}; the run was saved at this step",
            "lower training.learning_rate, or use training.precision float32",
        )


def report_out_of_memory(run: Run, step: int, size: int, smaller: int) -> None:
    """Report that a step restarts with smaller micro-batches, and which settings would start a run with them."""
    message = (
        f"step {step}: out of memory with {size} sequences at once. Continuing with {smaller} at once; the step keeps its "
        f"{run.config.global_batch_size} sequences. To start that way, {describe_smaller_batch(run.config, smaller)}."
    )
    run.tracker.log_event("out_of_memory", message, step)
