"""Curves as figures: those of one run, or of several over each other."""

import math
from collections.abc import Sequence

from smollm2.formatting import format_number
from smollm2.report.curves import CURVES, POINTS, POINTS_OF_A_PAGE, WORDS, Curve, make_curve, pick_evenly
from smollm2.report.markup import choices, figure, folded, note, table
from smollm2.report.reading import RunFolder
from smollm2.report.verdict import begin_sentence

SHOWN_ROWS = 12


def draw_curves(runs: Sequence[RunFolder]) -> str:
    """The curves of one run, or of several over each other, with what they stand on."""
    if not any(run.last_step for run in runs):
        return note("No update was reported yet.")
    points = max(100, min(POINTS, POINTS_OF_A_PAGE // (6 * len(runs))))
    controls = (
        '<form class="toolbar" aria-label="How the curves are drawn">'
        f"{choices('axis', 'Along', ('step', 'tokens', 'seconds'))}"
        '<label class="slider">Smoothing<input type="range" name="smoothing" min="0" max="0.99" step="0.01" value="0.6">'
        '<output name="shown">0.60</output></label>'
        '<label class="check"><input type="checkbox" name="log"><span>Log axis</span></label></form>'
    )
    charts = []
    for title, metrics in CURVES.items():
        drawn = [draw_metric(run, metric, points, is_alone=len(runs) == 1) for run in runs for metric in metrics]
        drawn = [curve for curve in drawn if curve["y"]]
        if drawn:
            summary = summarize(runs[0], metrics) if len(runs) == 1 else compare_ends(runs, metrics)
            charts.append(figure("curves", title.capitalize(), summary, {"title": title, "curves": drawn}))
    numbers = "".join(folded(f"Numbers of {run.name}" if len(runs) > 1 else "Numbers", list_rows(run)) for run in runs)
    return f'{controls}<div class="charts">{"".join(charts)}</div>{numbers}'


def draw_metric(run: RunFolder, metric: str, points: int, *, is_alone: bool) -> Curve:
    """A curve under the name that its legend shows."""
    name = WORDS[metric] if is_alone else f"{run.name}, validation" if metric == "validation_loss" else run.name
    return {**make_curve(run, metric, points), "name": name, "metric": metric, "run": run.name}


def summarize(run: RunFolder, metrics: Sequence[str]) -> str:
    """A chart in a sentence: where each of its curves begins, ends and is lowest."""
    said = []
    for metric in metrics:
        points = run.points(metric)
        if points:
            (first_step, first), (last_step, last) = points[0], points[-1]
            low_step, low = min(points, key=lambda point: point[1])
            lowest = "" if low_step == last_step else f", lowest {low:.4g} at {low_step:,}"
            said.append(f"{WORDS[metric]} {first:.4g} at update {first_step:,}, {last:.4g} at {last_step:,}{lowest}")
    return begin_sentence("; ".join(said))


def compare_ends(runs: Sequence[RunFolder], metrics: Sequence[str]) -> str:
    """A chart of several runs in a sentence: where the first of them end."""
    said = []
    for metric in metrics:
        ends = [(run.name, points[-1][1]) for run in runs if (points := run.points(metric))]
        named = ", ".join(f"{name} {value:.4g}" for name, value in ends[:8])
        said += [f"{WORDS[metric]} at the end: {named}"] if ends else []
    return begin_sentence("; ".join(said))


def list_rows(run: RunFolder) -> str:
    """Some reports as a table: the first, the last, and what lies evenly between."""
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

    header = ("Update", "Tokens", "Loss", "Last validation", "Learning rate", "Gradient norm", "Tokens a second")
    return table(header, map(cells, shown), f"{len(shown)} reports of {len(rows):,}", numeric=True)
