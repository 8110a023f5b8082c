"""Rows as curves that a browser can hold: at most 2,000 points each, with every bucket's minimum and maximum among them."""

import math
from collections.abc import Sequence
from typing import TypeVar

from smollm2.report.reading import RunFolder

Item = TypeVar("Item")

POINTS = 2000
POINTS_OF_A_PAGE = 24_000
SLOWEST = 1e-9
Curve = dict[str, object]
"""`name`, `step`, `tokens`, `seconds` and `y`, lists of one length; `mean`, that of each point's bucket, where thinned."""

CURVES = {
    "loss": ("loss", "validation_loss"),
    "bits per byte": ("validation_bpb",),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "tokens a second": ("tokens_per_second",),
}
"""What stands in one chart together."""

WORDS = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "validation_bpb": "bits per byte",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}
"""What a person calls them."""


def thin(values: Sequence[float], points: int) -> tuple[list[int], list[float]]:
    """Where the values to draw stand, at most `points` (at least 4) of them, and the mean of each one's bucket.

    NaN is no value. The first and the last are kept, and of each bucket between them the least and the greatest.
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
    """So many buckets, in order, as long as one another but for one item."""
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def pick_evenly(items: Sequence[int], count: int) -> list[int]:
    """At most so many (at least 2): the first, the last, and what lies evenly between; `items` rise."""
    return sorted({items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)}) if items else []


def make_curve(run: RunFolder, metric: str, points: int = POINTS) -> Curve:
    """One metric against steps, tokens and seconds of training."""
    values, axes = run.metrics[metric], axes_of(run)
    kept, means = thin(values, points)
    curve: Curve = {"name": metric, **{axis: [shorten(numbers[i], 9) for i in kept] for axis, numbers in axes.items()}}
    curve["y"] = [shorten(values[i]) for i in kept]
    if len(kept) < sum(not math.isnan(value) for value in values):
        curve["mean"] = [shorten(mean) for mean in means]
    return curve


def axes_of(run: RunFolder) -> dict[str, list[float]]:
    """What a curve can stand on, for each row. Seconds are those of the updates: tokens over tokens a second, since rows
    hold no clock; evaluation, samples and saves are outside them. A validation has the tokens of the report before it."""
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


def shorten(number: float, digits: int = 6) -> float | int:
    """The number with so many significant digits, whole where it is whole: a page holds tens of thousands."""
    short = float(f"{number:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def tail_mean(values: Sequence[float]) -> float:
    """Where a noisy curve stands at its end: the mean of its last fifth, of ten values at most."""
    count = min(10, max(1, len(values) // 5))
    return sum(values[-count:]) / count
