"""Curve figures, of one run or of several in one chart, each with a summary for readers who cannot see it."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from smollm2.formatting import format_number
from smollm2.report.baselines import baseline_lines
from smollm2.report.curves import (
    CURVES,
    POINTS,
    POINTS_OF_A_PAGE,
    WORDS,
    Curve,
    make_curve,
    marks_of,
    pick_evenly,
)
from smollm2.report.reading import RunFolder
from smollm2.report.verdict import begin_sentence

SHOWN_ROWS = 12
SMOOTHING = 0.6
SMOOTHED_FROM = 100
"""Fewest reports for smoothing: with fewer, the smoothed training loss lags so much that validation seems lower."""

Context = dict[str, Any]
"""The data that the template of a section or a figure needs."""


def curve_figures(runs: Sequence[RunFolder]) -> list[Context]:
    """Return a figure for each chart in CURVES that has data; the loss comes first."""
    points = max(100, min(POINTS, POINTS_OF_A_PAGE // (6 * len(runs))))
    figures = []
    for title, metrics in CURVES.items():
        if len(runs) == 1:
            metrics = (
                *metrics,
                *(name for name in runs[0].metrics if name.partition("/")[0] in metrics and "/" in name),
            )
        curves = [draw_metric(run, metric, points, is_alone=len(runs) == 1) for run in runs for metric in metrics]
        curves = [curve for curve in curves if curve["y"]]
        if curves:
            summary = summarize(runs[0], metrics) if len(runs) == 1 else compare_ends(runs, metrics)
            marks = marks_of(runs[0]) if len(runs) == 1 else {}
            lines = baseline_lines(runs[0], title) if len(runs) == 1 else []
            data = {"title": title, "curves": curves, "marks": marks, "baselines": lines}
            figures.append({"kind": "curves", "title": title.capitalize(), "summary": summary, "data": data})
    return figures


def initial_smoothing(runs: Sequence[RunFolder]) -> float:
    """Return the smoothing when the page opens, as the weight of past values; 0 for short runs."""
    return SMOOTHING if min(len(run.points("loss")) for run in runs) >= SMOOTHED_FROM else 0.0


def draw_metric(run: RunFolder, metric: str, points: int, *, is_alone: bool) -> Curve:
    """Return the curve of a metric, with the name that the chart shows."""
    name = (
        describe_metric(metric) if is_alone else f"{run.name}, validation" if metric == "validation_loss" else run.name
    )
    return {**make_curve(run, metric, points), "name": name, "metric": metric, "run": run.name}


def describe_metric(metric: str) -> str:
    """Return the name of a metric as shown on the page; that of one source of a mixture has the source in it."""
    name, _, source = metric.partition("/")
    return f"{WORDS[name]} of {source}" if source else WORDS[name]


def summarize(run: RunFolder, metrics: Sequence[str]) -> str:
    """Return a sentence with the first, last and lowest value of each curve."""
    parts = []
    for metric in metrics:
        points = run.points(metric)
        if points:
            (first_step, first), (last_step, last) = points[0], points[-1]
            low_step, low = min(points, key=lambda point: point[1])
            lowest = "" if low_step == last_step else f", lowest {write_out(low)} at {low_step:,}"
            ends = f"{write_out(first)} at step {first_step:,}, {write_out(last)} at {last_step:,}"
            parts.append(f"{describe_metric(metric)} {ends}{lowest}")
    return begin_sentence("; ".join(parts))


def compare_ends(runs: Sequence[RunFolder], metrics: Sequence[str]) -> str:
    """Return a sentence with the last value of each run, for the first eight runs."""
    parts = []
    for metric in metrics:
        ends = [(run.name, points[-1][1]) for run in runs if (points := run.points(metric))]
        named = ", ".join(f"{name} {write_out(value)}" for name, value in ends[:8])
        parts += [f"{WORDS[metric]} at the end: {named}"] if ends else []
    return begin_sentence("; ".join(parts))


def write_out(value: float) -> str:
    """Return the number with four significant digits and no exponent, such as `0.00003` or `13,460`."""
    return format(Decimal(f"{value:.4g}"), ",f")


def number_table(run: RunFolder) -> Context:
    """Return a table of some reports: the first, the last, and evenly spaced ones in between."""
    rows = [i for i, loss in enumerate(run.metrics["loss"]) if not math.isnan(loss)]
    shown = pick_evenly(rows, SHOWN_ROWS)
    validations = run.points("validation_loss")

    def cells(index: int) -> list[object]:
        step = int(run.metrics["step"][index])
        last = next((value for at, value in reversed(validations) if at <= step), math.nan)
        forms = {"loss": "{:.4f}", "learning_rate": "{:.3g}", "grad_norm": "{:.3f}", "tokens_per_second": "{:,.0f}"}
        numbers = {name: format_number(run.metrics[name][index], form) for name, form in forms.items()}
        tokens = format_number(run.metrics["tokens"][index], "{:,.0f}")
        return [f"{step:,}", tokens, numbers.pop("loss"), format_number(last), *numbers.values()]

    header = ("Step", "Tokens", "Loss", "Last validation", "Learning rate", "Gradient norm", "Tokens per second")
    return {
        "name": run.name,
        "header": header,
        "rows": [cells(index) for index in shown],
        "caption": f"{len(shown)} reports of {len(rows):,}",
    }
