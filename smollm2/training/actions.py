"""What happens between two steps: evaluation, samples, diagnostics, the loss landscape, saves."""

import contextlib
import dataclasses

import torch

from smollm2.analysis.diagnostics import Look, measure_activations
from smollm2.analysis.landscape import choose_side, choose_windows, list_points, measure_landscape
from smollm2.data.windows import Batch
from smollm2.errors import (
    Interrupted,
    TrainingError,
)
from smollm2.inference.evaluation import evaluate_on_ranks, spread
from smollm2.inference.generation import generate
from smollm2.runtime.device import Runtime
from smollm2.runtime.ranks import find_odd_replica, weight_sums
from smollm2.tracking.base import Sample
from smollm2.training.progress import Progress
from smollm2.training.resume import state_of
from smollm2.training.setup import Run
from smollm2.training.step import (
    MicroBatch,
)


def duties_of(run: Run, step: int) -> tuple[str, ...]:
    """What follows the update `step`, besides its report and its save."""
    t, last = run.config.training, step == run.config.training.train_steps
    validation = run.validation is not None and due(step, t.eval_interval, last)
    samples = t.sample_tokens > 0 and due(step, t.sample_interval, last)
    landscape = t.diagnostics_interval > 0 and due(step, run.config.wandb.landscape_interval, last)
    return ("validation",) * validation + ("samples",) * samples + ("landscape",) * landscape


def do_duties(run: Run, progress: Progress, size: int) -> tuple[Progress, float | None]:
    """What is pending, in order; what a signal cuts short stays so and is done again. And the validation loss."""
    step, best, validation_loss = progress.step, progress.best_validation_loss, None
    with contextlib.suppress(Interrupted):
        while progress.pending:
            if progress.pending[0] == "validation":
                validation_loss = validate(run, step, size, whole=step == run.config.training.train_steps)
                best = min(best, validation_loss)
            elif progress.pending[0] == "samples":
                run.tracker.log_text(draw_samples(run, step), step)
            else:
                log_landscape(run, step, size)
            progress = dataclasses.replace(progress, best_validation_loss=best, pending=progress.pending[1:])
    return progress, validation_loss


def due(step: int, interval: int, last: bool) -> bool:
    """Whether a duty of this interval (0: never) falls on this step; every duty falls on the last."""
    return last or (interval > 0 and step % interval == 0)


def split(batch: Batch, size: int, runtime: Runtime) -> list[MicroBatch]:
    """This rank's batch as micro-batches of `size` sequences, on the device."""
    parts = (torch.split(runtime.to_device(array), size) for array in batch if array is not None)
    return list(zip(*parts, strict=True))


def begin_look(run: Run, step: int) -> Look | None:
    """A look inside the model at update `step`, where one is due; rank 0's."""
    t = run.config.training
    is_due = t.diagnostics_interval > 0 and due(step, t.diagnostics_interval, step == t.train_steps)
    if not is_due or run.runtime.rank:
        return None
    drawn = (run.config.wandb.enabled and run.config.wandb.log_gradients) or t.tensorboard
    return Look(run.model, run.tracker.counted, histograms=drawn)


def end_look(run: Run, progress: Progress, look: Look | None, batch: Batch, size: int) -> Progress:
    """Tell what the look saw, with the activations of rank 0's first micro-batch; the clipped updates count anew."""
    if look is None:
        return progress
    with run.tracker.counted(), run.runtime.autocast():
        input_ids, _, *documents = split(batch, size, run.runtime)[0]
        activations = measure_activations(run.model, input_ids, *documents)
    clipped, updates = progress.clipped
    diagnosis = dataclasses.replace(look.diagnosis, activations=activations, clipped=clipped / updates)
    run.tracker.log_diagnosis(diagnosis, progress.step)
    return dataclasses.replace(progress, clipped=(0, 0))


def validate(run: Run, step: int, size: int, *, whole: bool) -> float:
    """Log validation loss and bits per byte over a fixed spread of windows, at the end over all of them."""
    assert run.validation is not None
    count = len(run.validation)
    indices = spread(count, count if whole else run.config.training.eval_windows)
    bytes_per_token = run.tokenizer.bytes_per_token
    found = evaluate_on_ranks(run.model, run.validation, indices, bytes_per_token, batch_size=size, runtime=run.runtime)
    # Tokens without bytes, such as the end of text alone, have no bits per byte.
    bits = {"validation_bpb": found.bits_per_byte} if found.text_bytes else {}
    run.tracker.log({"validation_loss": found.loss, **bits}, step)
    return found.loss


def draw_samples(run: Run, step: int) -> list[Sample]:
    """What the model writes after each prompt, and after none; drawn from the seed and the step alone.

    Raises Interrupted between two prompts.
    """
    t, samples, seed = run.config.training, [], (run.config.training.seed + step) % 2**63
    for prompt in (*t.sample_prompts, ""):
        run.runtime.raise_if_stopped()
        with run.runtime.autocast():
            text = generate(run.model, run.tokenizer, [prompt], max_new_tokens=t.sample_tokens, seed=seed)[0]
        samples.append(Sample(prompt, text))
    return samples


def log_landscape(run: Run, step: int, size: int) -> None:
    """Measure the loss around the weights, on all ranks, and tell it. Raises Interrupted, the weights as they were."""
    side, seed = choose_side(run.config, run.runtime.planned_device, size), run.config.training.seed
    advice = "smollm2 landscape draws one from the checkpoint"
    if not side:
        run.tracker.log_event("landscape", f"no loss landscape: the run is short, or its memory full; {advice}", step)
        return
    windows = run.validation or run.batches.windows
    indices, targets = choose_windows(windows)
    run.tracker.log_event(
        "landscape", f"the loss around the weights: {len(list_points(side))} points on {targets:,} tokens each", step
    )

    def measure_loss() -> float:
        bytes_per_token = run.tokenizer.bytes_per_token
        return evaluate_on_ranks(
            run.model, windows, indices, bytes_per_token, batch_size=size, runtime=run.runtime
        ).loss

    try:
        landscape = measure_landscape(run.model, measure_loss, side=side, seed=seed, targets=targets)
    except torch.OutOfMemoryError:
        if run.runtime.world_size > 1:  # the others wait for its share
            raise
        run.tracker.log_event("landscape", f"no loss landscape: out of memory; {advice}", step)
        return
    run.tracker.log_landscape(landscape, step)


def save(run: Run, progress: Progress, validation_loss: float | None, *, must_succeed: bool) -> None:
    """Rank 0 writes the checkpoint; it fails on every rank alike. Raises ResourceError where it must succeed and cannot."""
    run.runtime.pulse.mark("a save")
    with run.runtime.together():
        if run.saver:
            spikes, resumed = progress.spikes, run.resumed_step
            run.saver.save(state_of(run, progress), validation_loss, spikes, resumed, must_succeed=must_succeed)


def check_replicas(run: Run, step: int) -> None:
    """Raises TrainingError, naming the rank and a parameter, where the ranks' weights are no longer the same bits."""
    if run.runtime.world_size == 1:
        return
    odd = find_odd_replica(run.runtime.gather(weight_sums(run.model).tolist()))
    if odd:
        name = list(dict(run.model.named_parameters()))[odd[1]]
        raise TrainingError(
            f"step {step}: the weights of rank {odd[0]} are no longer those of the others, first in {name}; nothing was saved. "
            "Its memory or its device computes wrongly: take that machine out, and go on with --resume auto"
        )
