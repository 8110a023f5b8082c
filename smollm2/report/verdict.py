"""The verdict on a run: two sentences and some notes, each based on a rule in its function."""

import math
from collections.abc import Sequence

from smollm2.analysis.verdicts import RISE
from smollm2.report.curves import tail_mean
from smollm2.report.reading import LIFE, RunFolder

GAP = 0.1
"""A training loss more than this fraction below the validation loss is noted; similar texts differ by less."""


def status_of(run: RunFolder) -> str:
    """Return `running`, `finished`, `stopped`, `failed` or `interrupted`, from the last event in LIFE, the number of
    steps and the lock of the folder."""
    last = run.latest(*LIFE)
    kind = last["kind"] if last else ""
    if kind in ("stopped", "failed"):
        return str(kind)
    if kind == "done" or (run.train_steps and run.last_step >= run.train_steps and not run.is_held):
        return "finished"
    return "running" if run.is_held else "interrupted"


def verdict_of(run: RunFolder) -> list[str]:
    """Return at most two sentences: status and training loss, then validation. A failure fills the first alone."""
    if not run.last_step:
        return [f"{describe_status(run)}."]
    status, loss = describe_status(run), describe_loss(run)
    if status_of(run) == "failed":
        return [
            end_sentence(status),
            begin_sentence("; ".join(part for part in (loss, describe_validation(run)) if part)),
        ]
    first = f"{status}; {loss}." if loss else f"{status}."
    validation = describe_validation(run)
    return [first, begin_sentence(validation)] if validation else [first]


def notes_of(run: RunFolder) -> list[str]:
    """Return what deserves attention besides the verdict, with advice: overfitting, skipped steps, loss spikes, and the
    problems that were reported during the run, each as it was last."""
    notes = [note] if (note := advise_on_fit(run)) else []
    skips, spikes = (sum(event["kind"] == kind for event in run.events) for kind in ("skip", "spike"))
    if skips:
        notes.append(f"{count_of(skips, 'step')} skipped, because the loss or the gradient was not finite.")
    if change := describe_regression(run):
        notes.append(change)
    problems = {str(event.get("name")): event for event in run.events if event["kind"] == "verdict"}
    notes += [
        begin_sentence(event["message"])
        for event in problems.values()
        if event.get("is_problem") is True and event["message"]
    ]
    if spikes:
        notes.append(f"{count_of(spikes, 'loss spike')}: far above the losses before.")
    return notes


def describe_status(run: RunFolder) -> str:
    """Return how far the run got, and why it ended."""
    step, total = f"{run.last_step:,}", f" of {run.train_steps:,}" if run.train_steps else ""
    match status_of(run):
        case "finished":
            return f"All {step} steps are done"
        case "running":
            return f"The run is at step {step}{total}"
        case "stopped":
            return f"The run was stopped at step {step}{total} and can be resumed"
        case "failed":
            last = run.latest(*LIFE) or {}
            return f"The run failed at step {step}{total}: {last.get('reason', 'no reason was recorded')}"
    if not run.last_step:
        return "Nothing has been reported yet"
    return f"The run was interrupted after step {step}{total} (killed, or the machine went down)"


def describe_loss(run: RunFolder) -> str:
    """Return a clause with the first and last reported training losses, each of a single step as in metrics.jsonl."""
    losses = [loss for _, loss in run.points("loss")]
    if len(losses) < 2:
        return ""
    fell = tail_mean(losses) < losses[0]
    verb = "fell from" if fell else "did not fall: it went from"
    return f"the training loss {verb} {losses[0]:.3f} to {losses[-1]:.3f}"


def describe_validation(run: RunFolder) -> str:
    """Return bits per byte, which are comparable across tokenizers, or the loss; and whether the run overfits."""
    for metric, form in (("validation_bpb", "{:.3f} bits per byte"), ("validation_loss", "a loss of {:.3f}")):
        values = [value for _, value in run.points(metric)]
        if values:
            first = f" ({values[0]:.3f} at first)" if len(values) > 1 else ""
            return f"validation is at {form.format(values[-1])}{first}{describe_fit(run)}"
    if (run.latest("data") or {}).get("validation_tokens") in (0, 1):
        return "there was no validation, because the text is too short for a validation split"
    return "no validation has run yet" if status_of(run) == "running" else "no validation was run"


def describe_regression(run: RunFolder) -> str:
    """Return how the text that must not get worse fared (data.regression_input); empty if there is none."""
    values = [value for _, value in run.points("regression_bpb")]
    if len(values) < 2:
        return ""
    first, last = values[0], values[-1]
    verb = "got worse" if last > RISE * first else "did not get worse"
    return f"The text of data.regression_input {verb}: {describe_change(first, last)}."


def describe_change(first: float, last: float) -> str:
    """Return a change of bits per byte."""
    return f"{first:.4f} -> {last:.4f} bits per byte ({last / first - 1:+.1%})"


def describe_fit(run: RunFolder) -> str:
    """Return a clause on overfitting; empty with fewer than three validations."""
    risen = rise_of(run)
    if risen is None:
        return ""
    step, rise = risen
    if rise <= RISE - 1:
        return ", and the run does not overfit"
    fell = did_loss_fall(run, step)
    what = "the run overfits" if fell else "the run got worse"
    return f"; {what}: the validation loss rose by {rise:.0%} since step {step:,}{', while the training loss fell' if fell else ''}"


def advise_on_fit(run: RunFolder) -> str:
    """Return advice on overfitting or memorization; empty if none is needed."""
    risen = rise_of(run)
    if risen is None:
        return ""
    step, rise = risen
    if rise > RISE - 1:
        return (
            "Use more text or fewer steps, or the best checkpoint."
            if did_loss_fall(run, step)
            else "The training loss rose too: a lower learning rate may help."
        )
    losses = [loss for _, loss in run.points("loss")]
    gap = 1 - tail_mean(losses) / comparable_validations(run)[-1][1] if losses else 0.0
    return (
        f"The training loss is {gap:.0%} below the validation loss: part of the text is memorized." if gap > GAP else ""
    )


def rise_of(run: RunFolder) -> tuple[int, float] | None:
    """Return the step of the lowest validation loss, and the fraction by which the last one exceeds it."""
    points = comparable_validations(run)
    if len(points) < 3:
        return None
    step, lowest = min(points, key=lambda point: point[1])
    return step, points[-1][1] / lowest - 1 if lowest > 0 else 0.0


def comparable_validations(run: RunFolder) -> list[tuple[int, float]]:
    """Return the comparable validation losses: of four or more, the final step's, on the whole split, is left out."""
    points = run.points("validation_loss")
    return points[:-1] if len(points) > 3 and points[-1][0] == run.train_steps else points


def did_loss_fall(run: RunFolder, step: int) -> bool:
    """Return whether the training loss fell after a step."""
    reports = run.points("loss")
    before = [loss for at, loss in reports if at <= step]
    after = [loss for at, loss in reports if at > step]
    return bool(before and after) and tail_mean(after) < tail_mean(before)


def best_of(run: RunFolder, metric: str) -> tuple[int, float] | None:
    """Return the step and the value of a metric's minimum; None if the metric has no values."""
    return min(run.points(metric), key=lambda point: point[1], default=None)


def median_of(values: Sequence[float]) -> float:
    """Return the median; NaN if there are no values."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else math.nan


def begin_sentence(text: str) -> str:
    """Capitalize the first letter and end with a full stop."""
    return end_sentence(f"{text[0].upper()}{text[1:]}") if text else ""


def end_sentence(text: str) -> str:
    """Add a full stop unless there is one."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, such as `1 step` or `2 steps`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
