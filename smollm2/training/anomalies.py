"""What is reported about a step that is not as it should be: not finite, a spike, out of memory."""

from pathlib import Path

from smollm2.checkpoint.saving import list_before
from smollm2.errors import (
    TrainingError,
)
from smollm2.training.actions import save
from smollm2.training.memory import describe_out_of_memory
from smollm2.training.progress import Progress
from smollm2.training.setup import Run
from smollm2.training.step import (
    SPIKE_WINDOW,
    StepResult,
    too_many_skips,
)


def note_trouble(run: Run, progress: Progress, result: StepResult) -> None:
    """Say what is wrong with an update, and on which windows."""
    step = progress.step
    if result.skipped:
        handle_skip(run, progress, result)
    elif step in progress.spikes[-1:]:
        if run.saver:
            run.saver.finish()  # its file may be the last from before
        before = [path.name for path in list_before(Path(run.config.training.save_dir), step)]
        kept = f"{before[-1]} is from before and stays" if before else "no checkpoint is from before"
        windows = run.batches.window_ids(step - 1).tolist()
        message = (
            f"step {step}: the loss {result.loss:g} stands out from those of the last {SPIKE_WINDOW} updates; {kept}"
        )
        run.tracker.log_event("spike", message, step, windows=windows)


def note_out_of_memory(run: Run, step: int, size: int, smaller: int) -> None:
    """Say that an update begins anew in smaller micro-batches, and how to begin that way."""
    message = (
        f"step {step}: out of memory with {size} sequences at once; from here on {smaller} at once, as many an update. "
        f"To begin that way: {describe_out_of_memory(run.config, smaller)}"
    )
    run.tracker.log_event("out_of_memory", message, step)


def handle_skip(run: Run, progress: Progress, result: StepResult) -> None:
    """Say which update was skipped, on which windows. Raises TrainingError, with a checkpoint, where it must not go on."""
    step, fp16 = progress.step, run.runtime.scaler.is_enabled()
    windows = run.batches.window_ids(step - 1).tolist()
    numbers = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    run.tracker.log_event(
        "skip", f"step {step}: not finite ({numbers}); weights left as they were", step, windows=windows
    )
    reason = too_many_skips(progress.skipped, step, fp16=fp16)
    if reason is None and run.config.training.on_nonfinite == "stop" and not fp16:
        reason = f"step {step} was not finite ({numbers}) and training.on_nonfinite is stop"
    if reason:
        save(run, progress, None, must_succeed=True)
        raise TrainingError(
            f"{reason}; the run is saved at step {step}. Lower training.learning_rate, or use training.precision float32"
        )
