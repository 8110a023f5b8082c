"""What happens between steps: validation, samples, the loss landscape, diagnostics, saves.

Samples, landscape and diagnostics are optional: if one of them fails, this is reported and the run continues. The one
exception is a landscape on several ranks, whose failure ends the run.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from smollm2.analysis.diagnostics import StepDiagnostics, measure_activations
from smollm2.analysis.landscape import choose_side, choose_windows, list_points, measure_landscape
from smollm2.checkpoint.format import State
from smollm2.checkpoint.parts import PartedState, divide_state
from smollm2.data.chat import choose_template
from smollm2.data.conversations import Message
from smollm2.data.windows import WindowSource
from smollm2.errors import Interrupted, TrainingError
from smollm2.inference.evaluation import Evaluation, evaluate_on_ranks, spread
from smollm2.inference.generation import generate
from smollm2.runtime.ranks import find_odd_replica, weight_sums
from smollm2.runtime.sharding import gather_state, gathered
from smollm2.tracking.base import Sample, describe
from smollm2.training.progress import Progress
from smollm2.training.resume import count_compared_windows, list_compared_windows, state_of
from smollm2.training.setup import Run
from smollm2.training.step import MicroBatch

LANDSCAPE_LATER = "`smollm2 landscape` measures one from a checkpoint"


def is_due(step: int, interval: int, *, is_last: bool) -> bool:
    """Return whether an action is due: at every multiple of `interval` (never if it is 0), and at the last step."""
    return is_last or (interval > 0 and step % interval == 0)


def scheduled_actions(run: Run, step: int) -> tuple[str, ...]:
    """Return the names of the actions due after this step, in order, without its report and its save."""
    t, is_last = run.config.training, step == run.config.training.train_steps
    scheduled = {
        "validation": bool(run.validation or run.regression) and is_due(step, t.eval_interval, is_last=is_last),
        "samples": t.sample_tokens > 0 and is_due(step, t.sample_interval, is_last=is_last),
        "landscape": t.diagnostics_interval > 0 and is_due(step, run.config.wandb.landscape_interval, is_last=is_last),
    }
    return tuple(name for name, is_scheduled in scheduled.items() if is_scheduled)


def run_actions(run: Run, progress: Progress, size: int) -> tuple[Progress, float | None]:
    """Run the pending actions in order; return the new progress, and the validation loss if it was measured.

    An action that is interrupted by a signal stays pending, and the resumed run repeats it.
    """
    step, validation_loss = progress.step, None
    with contextlib.suppress(Interrupted):
        while progress.pending:
            match progress.pending[0]:
                case "validation":
                    validation_loss = validate(run, step, size)
                    found = math.inf if validation_loss is None else validation_loss
                    best = min(progress.best_validation_loss, found)
                    progress = dataclasses.replace(progress, best_validation_loss=best)
                case "samples":
                    if samples := draw_samples(run, step):
                        run.tracker.log_text(samples, step)
                case "landscape":
                    log_landscape(run, step, size)
            progress = dataclasses.replace(progress, pending=progress.pending[1:])
    return progress, validation_loss


def evaluate_before(run: Run, progress: Progress, size: int) -> None:
    """Validate before the first step of a run that starts from another model, or has a text that must not get worse."""
    if not progress.step and (run.config.model.init_from or run.regression):
        with contextlib.suppress(Interrupted):  # then the run ends after its first step, from which it can be resumed
            validate(run, 0, size)


def validate(run: Run, step: int, size: int) -> float | None:
    """Log the validation loss and bits per byte, also of each source; return the loss that compares checkpoints.

    It is measured on fixed windows, spread evenly over the validation split of each source. The last validation logs the
    results for the whole split. None if there is no validation text.
    """
    if run.validation is None:
        run.tracker.log(measure_regression(run, size), step)
        return None
    compared = list_compared_windows(run.config, run.validation)
    parts, windows = evaluate_sources(run, compared, size), len(compared)
    loss = functools.reduce(add, parts).loss
    count = len(run.validation)
    if step == run.config.training.train_steps and windows < count:
        rest = evaluate_sources(run, np.setdiff1d(np.arange(count), compared).tolist(), size)
        parts, windows = [add(*pair) for pair in zip(parts, rest, strict=True)], count
    numbers: dict[str, float | int] = {"validation_windows": windows}
    numbers |= list_losses(functools.reduce(add, parts), "")
    if len(parts) > 1:
        for name, part in zip(run.validation.names, parts, strict=True):
            numbers |= list_losses(part, f"/{name}")
    run.tracker.log(numbers | measure_regression(run, size), step)
    return loss


def measure_regression(run: Run, size: int) -> dict[str, float]:
    """Return the loss and the bits per byte on the text that must not get worse, always on the same windows."""
    if run.regression is None:
        return {}
    windows = spread(len(run.regression), run.config.training.eval_windows)
    found = evaluate(run, run.regression, windows, size)
    return {name.replace("validation", "regression"): value for name, value in list_losses(found, "").items()}


def list_losses(found: Evaluation, ending: str) -> dict[str, float]:
    """Return the loss and the bits per byte by name. Tokens without bytes, as the end of text, have no bits per byte."""
    losses = {f"validation_loss{ending}": found.loss} if found.tokens else {}
    return losses | ({f"validation_bpb{ending}": found.bits_per_byte} if found.text_bytes else {})


def evaluate_sources(run: Run, windows: Sequence[int], size: int) -> list[Evaluation]:
    """Return the summed loss, tokens and bytes of those of these validation windows that belong to each source."""
    assert run.validation is not None
    return [
        evaluate(run, run.validation, [i for i in windows if first <= i < last], size)
        for first, last in pairwise(run.validation.first)
    ]


def evaluate(run: Run, source: WindowSource, windows: Sequence[int], size: int) -> Evaluation:
    """Return the summed loss, tokens and bytes of these windows, computed by all ranks."""
    return evaluate_on_ranks(
        run.model, source, windows, run.tokenizer.bytes_per_token, batch_size=size, runtime=run.runtime
    )


def add(first: Evaluation, second: Evaluation) -> Evaluation:
    """Return the sum of two evaluations."""
    return Evaluation(
        first.loss_sum + second.loss_sum, first.tokens + second.tokens, first.text_bytes + second.text_bytes
    )


def draw_samples(run: Run, step: int) -> list[Sample]:
    """Return a sample for each prompt, and one without a prompt; of a chat model, its answer to each prompt.

    The random numbers of a sample depend only on the seed, the step and the prompt's position in the list. Raise
    Interrupted between two prompts if a signal was received.
    """
    with gathered(run.model):
        return draw_samples_from(run, step)


def draw_samples_from(run: Run, step: int) -> list[Sample]:
    """`draw_samples`, on a rank that has the whole model."""
    t, samples = run.config.training, []
    template = choose_template(run.tokenizer) if run.corpus.is_chat else None
    for index, prompt in enumerate(t.sample_prompts if template else (*t.sample_prompts, "")):
        run.runtime.raise_if_stopped()
        try:
            with run.runtime.autocast():
                text = generate(
                    run.model,
                    run.tokenizer,
                    [template.encode_prompt([Message("user", prompt)]) if template else prompt],
                    max_new_tokens=t.sample_tokens,
                    seed=sample_seed(t.seed, step, index),
                )[0]
            samples.append(Sample(prompt, text))
        except Interrupted:
            raise
        except Exception as error:
            report_skipped(run, "samples", f"the sample after {prompt!r}", describe(error), step)
    return samples


def sample_seed(seed: int, step: int, index: int) -> int:
    """Return the random seed of one sample. No two prompts at the same step share a seed."""
    return (seed + step + 1_000_003 * index) % 2**63


def report_skipped(run: Run, kind: str, what: str, problem: str, step: int) -> None:
    """Report that optional work, such as a sample, failed. The run continues."""
    run.tracker.log_event(kind, f"step {step}: skipped {what} ({problem})", step)


def log_landscape(run: Run, step: int, size: int) -> None:
    """Measure the loss around the weights on all ranks, and log it.

    Raise Interrupted, with the weights restored, if a signal was received.
    """
    side, seed = choose_side(run.config, run.runtime.planned_device, size), run.config.training.seed
    if not side:
        run.tracker.log_event("landscape", f"skipped the loss landscape: the run is too short; {LANDSCAPE_LATER}", step)
        return
    windows = run.validation or run.batches.windows
    indices, targets = choose_windows(windows)
    points = f"{len(list_points(side))} points on {targets:,} tokens each"
    run.tracker.log_event("landscape", f"measuring the loss landscape: {points}", step)

    def measure_loss() -> float:
        bytes_per_token = run.tokenizer.bytes_per_token
        return evaluate_on_ranks(
            run.model, windows, indices, bytes_per_token, batch_size=size, runtime=run.runtime
        ).loss

    try:
        landscape = measure_landscape(run.model, measure_loss, side=side, seed=seed, targets=targets)
    except Interrupted:
        raise
    except Exception as error:
        if run.runtime.world_size > 1:  # the other ranks wait for this one's part of the sum
            raise
        report_skipped(run, "landscape", "the loss landscape", describe(error), step)
        return
    run.tracker.log_landscape(landscape, step)


class Diagnostics(contextlib.AbstractContextManager["Diagnostics"]):
    """A context manager that collects the diagnostics of one step, on rank 0; the update is made inside it.

    An error is kept as text until it is logged: an exception object would keep the activations in memory.
    """

    def __init__(self, run: Run) -> None:
        t, wandb = run.config.training, run.config.wandb
        needs_histograms = (wandb.enabled and wandb.log_gradients) or t.tensorboard
        self.run, self.problem = run, ""
        self.collector = StepDiagnostics(
            run.model, run.tracker.counted, histograms=needs_histograms, layout=run.runtime.layout
        )

    def __enter__(self) -> "Diagnostics":
        try:
            self.collector.__enter__()
        except Exception as error:
            self.problem = describe(error)
        return self

    def __exit__(self, *error: object) -> None:
        if self.problem or error[0]:
            return
        try:
            self.collector.__exit__(*error)
        except Exception as failure:
            self.problem = describe(failure)

    def log(self, progress: Progress, micro_batch: MicroBatch) -> None:
        """Log the diagnostics of a completed step, with activation statistics of one micro-batch."""
        activations = self._measure_activations(micro_batch)
        if self.problem:
            report_skipped(self.run, "diagnostics", "the diagnostics", self.problem, progress.step)
            return
        clipped, steps = progress.clipped
        found = dataclasses.replace(self.collector.diagnosis, activations=activations, clipped=clipped / steps)
        self.run.tracker.log_diagnosis(found, progress.step)

    def _measure_activations(self, micro_batch: MicroBatch) -> dict[str, dict[str, float]]:
        input_ids, _, *documents = micro_batch
        try:
            with self.run.tracker.counted(), gathered(self.run.model), self.run.runtime.autocast():
                return measure_activations(self.run.model, input_ids, *documents)
        except Exception as error:
            self.problem = self.problem or describe(error)
            return {}


def scheduled_diagnostics(run: Run, step: int) -> Diagnostics | None:
    """Return a `Diagnostics` for this step, or None if none are due on this rank."""
    t = run.config.training
    if (run.runtime.rank and not run.runtime.layout.is_sharded) or t.diagnostics_interval == 0:
        return None
    return Diagnostics(run) if is_due(step, t.diagnostics_interval, is_last=step == t.train_steps) else None


def save(run: Run, progress: Progress, validation_loss: float | None, *, must_succeed: bool) -> None:
    """Write the checkpoint on rank 0. If it fails and `must_succeed` is set, raise ResourceError there.

    In that case, the other ranks raise an error as well, and all end together.
    """
    check_replicas(run, progress.step)
    run.runtime.pulse.mark("a save")
    state: State | PartedState = {}
    tied = run.config.model.tie_word_embeddings
    if run.saves_folders:
        state = divide_state(state_of(run, progress), tied=tied, group=run.save_group)
    elif run.saver or run.runtime.layout.is_sharded:
        state = gather_state(state_of(run, progress), tied=tied)
    with run.runtime.together():
        if run.saver:
            run.saver.save(
                state,
                validation_loss,
                windows=count_compared_windows(run.config, run.validation),
                spikes=progress.spikes,
                resumed_step=run.resumed_step,
                must_succeed=must_succeed,
            )


def check_replicas(run: Run, step: int) -> None:
    """Raise TrainingError, naming the rank and a parameter, if the ranks' weights are not bit-identical."""
    layout = run.runtime.layout
    if layout.replicas == 1:
        return
    sums = run.runtime.gather(weight_sums(run.model).tolist())
    for part in range(layout.shards):  # each part is on every `shards`-th rank
        odd = find_odd_replica(sums[part :: layout.shards])
        if odd is None:
            continue
        name = list(dict(run.model.named_parameters()))[odd[1]]
        raise TrainingError(
            f"step {step}",
            f"the weights of rank {part + odd[0] * layout.shards} differ from those of the other ranks, first in {name}; nothing was saved",
            "the memory or the device of that rank is probably faulty: remove its machine, and resume with --resume auto",
        )
