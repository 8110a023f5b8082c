"""The baselines of a run as its report shows them: lines in the curves, and a table."""

import math

from smollm2.formatting import format_number
from smollm2.report.curves import shorten
from smollm2.report.json_files import to_numbers
from smollm2.report.reading import RunFolder
from smollm2.tracking.charts import BASELINES

UNITS = {"loss": ("losses", "validation_loss"), "bits per byte": ("bits_per_byte", "validation_bpb")}
"""For each chart with baselines: where the event has their values, and the metric that they are compared with."""


def baselines_of(run: RunFolder, chart: str) -> dict[str, float]:
    """Return the baselines of a chart by name, those that read more tokens last."""
    event = run.latest("baselines")
    if event is None or chart not in UNITS:
        return {}
    try:
        values = to_numbers(event[UNITS[chart][0]])
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {name: values[name] for name in BASELINES if math.isfinite(values.get(name, math.nan))}


def baseline_lines(run: RunFolder, chart: str) -> list[dict[str, object]]:
    """Return the lines that a chart of curves draws across."""
    return [{"name": name, "y": shorten(value)} for name, value in baselines_of(run, chart).items()]


def baseline_table(run: RunFolder) -> dict[str, object] | None:
    """Return a table of the baselines and of the validation that was first below each; None if none were measured."""
    losses, bits = baselines_of(run, "loss"), baselines_of(run, "bits per byte")
    if not losses:
        return None
    validations = run.points("validation_loss")

    def passed(loss: float) -> str:
        return next((f"{step:,}" for step, value in validations if value < loss), "–")

    return {
        "name": "n-gram models of the same text",
        "header": ("Baseline", "Nats per token", "Bits per byte", "Passed at step"),
        "rows": [
            [name, f"{loss:.4f}", format_number(bits.get(name, math.nan)), passed(loss)]
            for name, loss in losses.items()
        ],
        "caption": "The losses of n-gram models on the validation text, and the first validation below each",
    }
