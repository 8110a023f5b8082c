"""What became of a run, in sentences; each by a rule that its function names."""

import math
from collections.abc import Sequence

from smollm2.report.curves import tail_mean
from smollm2.report.reading import LIFE, RunFolder

RISE = 1.01
"""A validation loss this many times the lowest has risen: less is the noise of a few windows."""

GAP = 0.1
"""A training loss this much below the validation loss is told: the distance of two texts of one kind is less."""


def status_of(run: RunFolder) -> str:
    """`running`, `finished`, `stopped`, `failed` or `broken off`: by the last of the events that say so."""
    last = run.latest(*LIFE)
    kind = last["kind"] if last else ""
    if kind in ("stopped", "failed"):
        return str(kind)
    if kind == "done" or (run.train_steps and run.last_step >= run.train_steps and not run.is_held):
        return "finished"
    return "running" if run.is_held else "broken off"


def describe_status(run: RunFolder) -> str:
    """How far the run came, and why no farther."""
    total = f" of {run.train_steps:,}" if run.train_steps else ""
    match status_of(run):
        case "finished":
            return f"All {run.last_step:,} updates are done."
        case "running":
            return f"It is at update {run.last_step:,}{total}."
        case "stopped":
            return f"It was stopped at update {run.last_step:,}{total} and can go on from there."
        case "failed":
            last = run.latest(*LIFE) or {}
            return f"It failed at update {run.last_step:,}{total}: {last.get('reason', 'no reason was left')}"
    if not run.last_step:
        return "Nothing was reported yet."
    return f"It ended after update {run.last_step:,}{total} without a word: killed, or the machine went down."


def describe_loss(run: RunFolder) -> str:
    """From the first report to the mean of the last ones."""
    losses = [loss for _, loss in run.points("loss")]
    if len(losses) < 2:
        return "There are not enough reports yet to say where the loss is going."
    first, last = losses[0], tail_mean(losses)
    verb = "fell" if last < first else "did not fall: it went"
    return f"The training loss {verb} from {first:.2f} to {last:.2f}."


def describe_bits(run: RunFolder) -> str:
    """Bits per byte, by which runs of other tokenizers compare, against the first validation."""
    bits = [value for _, value in run.points("validation_bpb")]
    if not bits:
        return ""
    if len(bits) == 1:
        return f"Text that it was not trained on takes {bits[0]:.2f} bits per byte."
    return f"Text that it was not trained on takes {bits[-1]:.2f} bits per byte, against {bits[0]:.2f} at the first validation."


def describe_fit(run: RunFolder) -> str:
    """Whether it overfits: the validation loss has risen by over 1 % since its lowest, and the training loss has not.

    The last validation reads the whole split and those before it a part of it, so it has no say where three came before.
    """
    points = run.points("validation_loss")
    if len(points) > 3 and points[-1][0] == run.train_steps:
        points = points[:-1]
    if len(points) < 3:
        return ""
    best_step, best = min(points, key=lambda point: point[1])
    reports = run.points("loss")
    losses = [loss for _, loss in reports]
    if points[-1][1] <= best * RISE:
        gap = 1 - tail_mean(losses) / points[-1][1] if losses else 0.0
        more = f"; the training loss is {gap:.0%} lower, so part of the text is learned by heart" if gap > GAP else ""
        return f"It does not overfit: the validation loss has not risen from its lowest{more}."
    risen = f"the validation loss has risen by {points[-1][1] / best - 1:.0%} since update {best_step:,}"
    before = [loss for step, loss in reports if step <= best_step]
    after = [loss for step, loss in reports if step > best_step]
    if before and after and tail_mean(after) < tail_mean(before):
        return f"It overfits: {risen}, while the training loss fell on. More text or fewer updates would help."
    return f"It got worse: {risen}, and the training loss has not fallen either. A lower learning rate may help."


def describe_trouble(run: RunFolder) -> str:
    """Skipped updates and spikes."""
    skips = sum(event["kind"] == "skip" for event in run.events)
    spikes = sum(event["kind"] == "spike" for event in run.events)
    if not skips and not spikes:
        return "No update was skipped and no loss stood out." if run.last_step else ""
    said = [f"{count_of(skips, 'update')} skipped, because loss or gradient was not finite"] if skips else []
    said += [f"{count_of(spikes, 'loss', 'losses')} stood out from those before"] if spikes else []
    return begin_sentence("; ".join(said))


def verdict_of(run: RunFolder) -> list[str]:
    """The sentences, the state of the run first."""
    if not run.last_step:
        return [describe_status(run)]
    parts = (describe_status, describe_loss, describe_bits, describe_fit, describe_trouble)
    return [sentence for part in parts if (sentence := part(run))]


def best_of(run: RunFolder, metric: str) -> tuple[int, float] | None:
    """Where a metric is lowest."""
    return min(run.points(metric), key=lambda point: point[1], default=None)


def median_of(values: Sequence[float]) -> float:
    """The middle one; NaN of none."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else math.nan


def begin_sentence(text: str) -> str:
    """With a capital, and a full stop."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def count_of(number: int, noun: str, plural: str = "") -> str:
    """`1 update`, `2 updates`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
