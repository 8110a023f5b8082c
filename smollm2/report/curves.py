"""Metrics as curves that a browser can handle: at most 2,000 points each.

Longer ones are thinned to the minimum and maximum of each bucket of consecutive values.
"""

import bisect
import math
from collections.abc import Sequence
from typing import TypeVar

from smollm2.report.reading import RunFolder

Item = TypeVar("Item")

POINTS = 2000
POINTS_OF_A_PAGE = 24_000
SHOWN_MARKS = 200
SLOWEST = 1e-9
Curve = dict[str, object]
"""`name`, and lists of equal length: `step`, `tokens`, `seconds`, `y` and, if thinned, `mean`, the bucket means."""

Place = dict[str, float | int]
"""A position on each of the axes `step`, `tokens` and `seconds`."""

CURVES = {
    "loss": ("loss", "validation_loss", "regression_loss"),
    "bits per byte": ("validation_bpb", "regression_bpb"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
}
"""The title of each chart, and the metrics that it shows."""

WORDS = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "validation_bpb": "bits per byte",
    "regression_loss": "loss on the other text",
    "regression_bpb": "bits per byte on the other text",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
"""The name of each metric, as shown on the page."""


def thin(values: Sequence[float], points: int) -> tuple[list[int], list[float]]:
    """Return the indices of the values to draw, at most `points` (at least 4), and the mean of each one's bucket.

    NaN is ignored. The first and last values are kept, and so are the minimum and maximum of each bucket between them.
    """
    indices = [index for index, value in enumerate(values) if not math.isnan(value)]
    if len(indices) <= points:
        return indices, [values[index] for index in indices]
    first, *inner, last = indices
    kept, means = [first], [values[first]]
    for bucket in split_evenly(inner, (points - 2) // 2):
        mean = sum(values[index] for index in bucket) / len(bucket)
        for index in sorted({min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)}):
            kept.append(index)
            means.append(mean)
    return [*kept, last], [*means, values[last]]


def split_evenly(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Split the items, in order, into `count` buckets whose lengths differ by at most one."""
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def pick_evenly(items: Sequence[int], count: int) -> list[int]:
    """Return at most `count` (at least 2) of the sorted items: the first, the last, and evenly spaced ones between."""
    return sorted({items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)}) if items else []


def make_curve(run: RunFolder, metric: str, points: int = POINTS) -> Curve:
    """Return the curve of one metric over steps, tokens and seconds of training, with at most `points` points."""
    values, axes = run.metrics[metric], axes_of(run)
    kept, means = thin(values, points)
    curve: Curve = {"name": metric, **{axis: [shorten(numbers[i], 9) for i in kept] for axis, numbers in axes.items()}}
    curve["y"] = [shorten(values[i]) for i in kept]
    if len(kept) < sum(not math.isnan(value) for value in values):
        curve["mean"] = [shorten(mean) for mean in means]
    return curve


def axes_of(run: RunFolder) -> dict[str, list[float]]:
    """Return the step, the tokens and the seconds of each row.

    Seconds count training steps only (tokens divided by tokens per second), because rows have no timestamp; evaluation,
    samples and saves are excluded. A validation row takes its token count from the preceding training row.
    """
    axes: dict[str, list[float]] = {"step": list(run.metrics["step"]), "tokens": [], "seconds": []}
    tokens, seconds = 0.0, 0.0
    for total, rate in zip(run.metrics["tokens"], run.metrics["tokens_per_second"], strict=True):
        if not math.isnan(total):
            if rate > SLOWEST:
                seconds += max(0.0, total - tokens) / rate
            tokens = total
        axes["tokens"].append(tokens)
        axes["seconds"].append(seconds)
    return axes


def marks_of(run: RunFolder) -> dict[str, object]:
    """Return the marks on the curves of a run: warmup, resumes, the best checkpoint, skipped steps and spikes."""
    axes = axes_of(run)

    def place(step: float) -> Place:
        """Return the position of a step; tokens and seconds are interpolated between rows."""
        rows = axes["step"]
        right = min(bisect.bisect_left(rows, step), len(rows) - 1)
        left = max(0, right - 1)
        share = (step - rows[left]) / (rows[right] - rows[left]) if rows[right] > rows[left] else 1.0
        share = min(1.0, max(0.0, share))
        found = {
            name: axes[name][left] + share * (axes[name][right] - axes[name][left]) for name in ("tokens", "seconds")
        }
        return {"step": shorten(step), **{name: shorten(value, 9) for name, value in found.items()}}

    if not axes["step"]:
        return {}
    marks: dict[str, object] = {
        kind: [place(event["step"]) for event in run.events if event["kind"] == kind][-SHOWN_MARKS:]
        for kind in ("resume", "skip", "spike")
    }
    warmup = run.number("training.warmup_steps") or 0
    if warmup > 0:
        marks["warmup"] = place(min(warmup, run.last_step))
    step = (run.best or {}).get("step")
    losses = dict(run.points("validation_loss"))
    if isinstance(step, int) and step in losses:
        marks["best"] = {**place(step), "y": shorten(losses[step])}
    return marks


def shorten(number: float, digits: int = 6) -> float | int:
    """Round to `digits` significant digits, and to an integer if whole: a page has tens of thousands of numbers."""
    short = float(f"{number:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def tail_mean(values: Sequence[float]) -> float:
    """Return the mean of the last fifth of the values, at most ten of them: the final level of a noisy curve."""
    count = min(10, max(1, len(values) // 5))
    return sum(values[-count:]) / count
