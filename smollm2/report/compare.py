"""The sections of the page that compares several runs: which is better, by how much, and at what cost in time.

If the runs have the same tokens and windows, their validation losses are compared, otherwise their bits per byte. Two
runs are compared in pairs of validations: those at the same step, on the same windows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from smollm2.formatting import format_duration
from smollm2.report.curves import axes_of
from smollm2.report.figures import Context, curve_figures, initial_smoothing, number_table
from smollm2.report.reading import RunFolder
from smollm2.report.sections import key_figures, seconds_of
from smollm2.report.verdict import best_of, describe_status, status_of

SHOWN_PROMPTS = 8
NAMES = {"validation_loss": "validation loss", "validation_bpb": "bits per byte"}
SAME_DATA = ("tokens", "bytes", "vocab_size", "train_tokens", "validation_tokens", "window_tokens")


class Comparison(NamedTuple):
    """One section of the page: its id (also the template's name), its heading, and what builds the template's data."""

    id: str
    title: str
    build: Callable[[Sequence[RunFolder]], Context]
    is_collapsed: bool = False


def runs_section(runs: Sequence[RunFolder]) -> Context:
    """Return the state and key figures of each run, which run is best, and how far the others are behind it."""
    metric = comparable_metric(runs)
    scores = {run.name: found[1] for run in runs if (found := best_of(run, metric))}
    best = min(scores, key=scores.__getitem__, default=None)
    is_tie = best is not None and list(scores.values()).count(scores[best]) > 1
    figures = [key_figures(run) for run in runs]
    rows = []
    for run, shown in zip(runs, figures, strict=True):
        behind = f"+{scores[run.name] - scores[best]:.3f}" if best and run.name in scores and run.name != best else "–"
        cells = [f"{run.last_step:,}", *(value for _, value in shown), behind]
        rows.append(
            {"name": run.name, "status": status_of(run), "is_best": run.name == best and not is_tie, "cells": cells}
        )
    return {
        "sentences": compare_best(runs, metric),
        "header": ("Run", "State", "Steps", *(name for name, _ in figures[0]), f"Behind in {NAMES[metric]}"),
        "rows": rows,
        "unfinished": [(run.name, describe_status(run)) for run in runs if status_of(run) != "finished"],
        "problems": [f"{run.name}: {problem}" for run in runs for problem in run.problems],
    }


def comparable_metric(runs: Sequence[RunFolder]) -> str:
    """Return `validation_loss` if all runs validated on the same tokens and windows, else `validation_bpb`."""

    def data_of(run: RunFolder) -> list[object]:
        event = run.latest("data") or {}
        return [event.get(key) for key in SAME_DATA]

    known = data_of(runs[0])
    return "validation_loss" if any(known) and all(data_of(run) == known for run in runs) else "validation_bpb"


def compare_best(runs: Sequence[RunFolder], metric: str) -> list[str]:
    """Return sentences that compare the best run with the second best: the difference, its spread, and the time."""
    scored = sorted(((found[1], run) for run in runs if (found := best_of(run, metric))), key=lambda pair: pair[0])
    if len(scored) < 2:
        return [f"The runs cannot be compared: fewer than two have {NAMES[metric]}."]
    (low, first), (high, second) = scored[:2]
    if low == high:
        return [f"{first.name} and {second.name} have the same {NAMES[metric]}, {low:.3f}."]
    share = f" ({(high - low) / high:.1%})" if high > 0 else ""
    sentences = [
        f"{first.name} is better than {second.name}: its best {NAMES[metric]} is {low:.3f} instead of {high:.3f}, "
        f"lower by {high - low:.3f}{share}."
    ]
    return [*sentences, *describe_pairs(first, second, metric), *describe_time(first, second, metric, high)]


def describe_pairs(first: RunFolder, second: RunFolder, metric: str) -> list[str]:
    """Return a sentence on how often, and by how much, the first run is lower; none if there are fewer than two pairs.

    The last step of a run validates on the whole split, so it is paired only with the last step of the other run.
    """
    others = dict(second.points(metric))
    unpaired = {first.train_steps, second.train_steps} if first.train_steps != second.train_steps else set()
    pairs = [(value, others[step]) for step, value in first.points(metric) if step in others and step not in unpaired]
    differences = [theirs - ours for ours, theirs in pairs]
    if len(differences) < 2:
        return []
    lower = sum(difference > 0 for difference in differences)
    spread = f"by {min(differences):.3f} to {max(differences):.3f}"
    if lower == len(differences):
        return [f"It is lower at each of the {lower} validations that both have, {spread}."]
    return [
        f"It is lower at {lower} of the {len(differences)} validations that both have: the difference is not clear."
    ]


def describe_time(first: RunFolder, second: RunFolder, metric: str, target: float) -> list[str]:
    """Return a sentence with both runs' durations, and when the better run reached the other's best value."""
    ours, theirs = seconds_of(first), seconds_of(second)
    if not ours or not theirs:
        return []
    more = "longer" if ours > theirs else "shorter"
    change = f" ({abs(ours - theirs) / theirs:.0%} {more})" if round(ours) != round(theirs) else ""
    sentence = f"It ran for {format_duration(ours)} instead of {format_duration(theirs)}{change}"
    pairs = zip(axes_of(first)["seconds"], first.metrics[metric], strict=True)
    reached = next((seconds for seconds, value in pairs if value <= target), 0.0)
    return [
        f"{sentence}, and reached {target:.3f} after {format_duration(reached)} of training."
        if reached
        else f"{sentence}."
    ]


def curves_section(runs: Sequence[RunFolder]) -> Context:
    """Return the curves of all runs in shared charts."""
    if not any(run.last_step for run in runs):
        return {"note": "Nothing has been reported yet."}
    tables = [number_table(run) for run in runs]
    return {"figures": curve_figures(runs), "tables": tables, "smoothing": initial_smoothing(runs)}


def differences_section(runs: Sequence[RunFolder]) -> Context:
    """Return the config keys whose values differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = []
    for key in keys:
        values = [run.settings[key].value if key in run.settings else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append((key, values))
    if not rows:
        return {"note": "The configs of these runs are the same, or cannot be read."}
    return {"header": ("Key", *(run.name for run in runs)), "rows": rows}


def last_samples_section(runs: Sequence[RunFolder]) -> Context:
    """Return each run's last sample for each prompt."""
    prompts = list(dict.fromkeys(row["prompt"] for run in runs for row in run.samples))[:SHOWN_PROMPTS]
    if not prompts:
        return {"note": "None of these runs has samples."}

    def last_of(prompt: str) -> list[tuple[str, int, str]]:
        rows = [(run, next((row for row in reversed(run.samples) if row["prompt"] == prompt), None)) for run in runs]
        return [(run.name, row["step"], row["text"]) for run, row in rows if row]

    return {"prompts": [(prompt, last_of(prompt)) for prompt in prompts]}


COMPARISON = (
    Comparison("runs", "Runs", runs_section),
    Comparison("curves", "Curves", curves_section),
    Comparison("differences", "Differences", differences_section),
    Comparison("last_samples", "Last samples", last_samples_section),
)
"""The sections of the page about several runs, from top to bottom."""
