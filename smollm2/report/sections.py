"""The sections of the page about one run: each is a function that turns the run folder into data for its template.

A new section needs a function here, an entry in `SECTIONS` and a template named after its id.
"""

import math
import shlex
from collections.abc import Callable, Mapping
from typing import NamedTuple

from smollm2.formatting import format_bytes, format_count, format_duration
from smollm2.report.baselines import baseline_table
from smollm2.report.checks import checks_section
from smollm2.report.curves import shorten
from smollm2.report.data import data_section
from smollm2.report.diagnostics import diagnostics_section
from smollm2.report.figures import Context, curve_figures, initial_smoothing, number_table
from smollm2.report.reading import RunFolder
from smollm2.report.samples import latest_sample, samples_section
from smollm2.report.verdict import best_of, median_of, notes_of, status_of, verdict_of
from smollm2.tracking.base import Landscape
from smollm2.tracking.charts import landscape_figures

SHOWN_EVENTS = 300

MACHINE = {
    "system": "System",
    "device": "Device",
    "precision": "Precision",
    "threads": "Threads",
    "world_size": "Processes",
    "python": "Python",
    "torch": "PyTorch",
    "smollm2": "smollm2",
}


class Section(NamedTuple):
    """One section: its id (the template's name), its heading, what builds its data, and whether it starts collapsed."""

    id: str
    title: str
    build: Callable[[RunFolder], Context]
    is_collapsed: bool = False


def summary_section(run: RunFolder) -> Context:
    """Return the first screen: the verdict, the key figures, the loss curve and the latest sample."""
    figures = curve_figures([run]) if run.last_step else []
    return {
        "status": status_of(run) if run.last_step else "empty",
        "sentences": verdict_of(run),
        "notes": notes_of(run) if run.last_step else [],
        "tiles": key_figures(run),
        "problems": run.problems,
        "figure": figures[0] if figures and figures[0]["data"]["title"] == "loss" else None,
        "smoothing": initial_smoothing([run]),
        "sample": latest_sample(run),
    }


def key_figures(run: RunFolder) -> list[tuple[str, str]]:
    """Return the numbers that a reader looks for first. The training loss is that of the last report."""
    losses = [loss for _, loss in run.points("loss")]
    validation, bits = best_of(run, "validation_loss"), best_of(run, "validation_bpb")
    tokens = max((value for _, value in run.points("tokens")), default=math.nan)
    rate = median_of([value for _, value in run.points("tokens_per_second")])
    seconds = seconds_of(run)
    return [
        ("Training loss", f"{losses[-1]:.3f}" if losses else "–"),
        ("Best validation loss", f"{validation[1]:.3f}" if validation else "–"),
        ("Bits per byte", f"{bits[1]:.3f}" if bits else "–"),
        ("Tokens seen", "–" if math.isnan(tokens) else format_count(tokens)),
        ("Tokens per second", "–" if math.isnan(rate) else f"{rate:,.0f}"),
        ("Ran for", format_duration(seconds) if seconds else "–"),
    ]


def curves_section(run: RunFolder) -> Context:
    """Return the curves other than the loss, and the table of numbers."""
    if not run.last_step:
        return {"note": "Nothing has been reported yet."}
    figures = [figure for figure in curve_figures([run]) if figure["data"]["title"] != "loss"]
    tables = [table for table in (number_table(run), baseline_table(run)) if table]
    return {"figures": figures, "tables": tables, "smoothing": None}


def landscape_section(run: RunFolder) -> Context:
    """Return the landscape of the run folder, or the command that measures one."""
    if run.landscape is None:
        command = f"smollm2 landscape {shlex.quote(newest_checkpoint(run))}"
        return {"note": f"No landscape was measured. Measure one with {command} and write this report again."}
    return landscape_context(*run.landscape)


def landscape_context(step: int, landscape: Landscape) -> Context:
    """Return the loss around the weights: along two directions as a surface or a map, and along one as a line."""
    values = [value for row in landscape.grid for value in row if math.isfinite(value)]
    pairs = zip(landscape.line_at, landscape.line, strict=True)
    line = [(at, value) for at, value in pairs if math.isfinite(value)]
    figures = landscape_figures(shorten_landscape(landscape))
    shown = []
    if values:
        summary = f"Lowest {min(values):.4g}, highest {max(values):.4g}. Drag it to turn it."
        shown.append(
            {"kind": "surface", "title": "Along two directions", "summary": summary, "data": figures["surface"]}
        )
    if line:
        at, low = min(line, key=lambda point: point[1])
        (left, first), (right, last) = line[0], line[-1]
        summary = f"Lowest {low:.4g} at {at:.3g}; {first:.4g} at {left:.3g} and {last:.4g} at {right:.3g}."
        shown.append(
            {"kind": "line", "title": "Along the first direction", "summary": summary, "data": figures["line"]}
        )
    return {
        "intro": (
            f"Loss around the weights of step {step:,} along two random filter-normalized directions (Li et al. 2018), on "
            f"{landscape.targets:,} tokens: {landscape.loss:.4f} at the weights themselves. A wide, smooth valley is healthy."
        ),
        "figures": shown,
        "rows": [(f"{at:.3g}", f"{value:.4f}") for at, value in line],
    }


def shorten_landscape(landscape: Landscape) -> Landscape:
    """Return the landscape with fewer digits; values that are not finite become gaps."""

    def short(values: "list[float] | tuple[float, ...]") -> list[float]:
        return [shorten(value) if math.isfinite(value) else math.nan for value in values]

    return Landscape(
        loss=landscape.loss,
        line_at=short(list(landscape.line_at)),
        line=short(list(landscape.line)),
        grid_at=short(list(landscape.grid_at)),
        grid=[short(list(row)) for row in landscape.grid],
        seed=landscape.seed,
        targets=landscape.targets,
    )


def newest_checkpoint(run: RunFolder) -> str:
    """Return the path of the newest checkpoint, as a user would type it."""
    return str(run.checkpoints[-1][1]) if run.checkpoints else f"{run.path}/step_XXXX.pt"


def events_section(run: RunFolder) -> Context:
    """Return the events other than training steps; if there are too many, old checkpoint events are omitted first."""
    events = [event for event in run.events if event["kind"] not in ("data", "baselines")]
    if not events:
        return {"note": "No events were recorded."}
    kinds: dict[str, int] = {}
    for event in events:
        kinds[event["kind"]] = kinds.get(event["kind"], 0) + 1
    rare = [event for event in events if event["kind"] != "checkpoint"][-SHOWN_EVENTS:]
    regular = [event for event in events if event["kind"] == "checkpoint"]
    regular = regular[-max(20, SHOWN_EVENTS - len(rare)) :]
    shown = sorted([*rare, *regular], key=lambda event: event["step"])
    counts = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in sorted(kinds.items()))
    more = f" {len(events) - len(shown):,} older ones are in events.jsonl." if len(shown) < len(events) else ""
    return {
        "count": f"{len(events):,}",
        "intro": f"{counts}.{more}",
        "rows": [(event, describe_event(event)) for event in reversed(shown)],
    }


def describe_event(event: Mapping[str, object]) -> str:
    """Return the event's message, or if it has none, a description based on its details."""
    if event["message"]:
        return str(event["message"])
    if event["kind"] == "start":
        return f"on {event.get('device', 'an unnamed device')}"
    return "the last step" if event["kind"] == "done" else str(event.get("reason", ""))


def config_section(run: RunFolder) -> Context:
    """Return every value, its origin, and whether it is a default."""
    if not run.settings:
        return {"note": "There is no config.yaml to read."}
    given = sum(not setting.is_default for setting in run.settings.values())
    return {"count": f"{given} of {len(run.settings)} values set", "settings": run.settings}


def sessions_of(run: RunFolder) -> list[tuple[float, float]]:
    """Return the times of the first and last event of each session; every start or resume begins a session."""
    sessions: list[tuple[float, float]] = []
    for event in run.events:
        if math.isnan(event["time"]):
            continue
        if event["kind"] == "start":
            sessions.append((event["time"], event["time"]))
        elif sessions:
            sessions[-1] = (sessions[-1][0], max(sessions[-1][1], event["time"]))
    return sessions


def seconds_of(run: RunFolder) -> float:
    """Return the run's total duration in seconds, over all its sessions."""
    return sum(end - start for start, end in sessions_of(run))


def machine_section(run: RunFolder) -> Context:
    """Return facts about the machine, and the sessions of the run."""
    starts = [event for event in run.events if event["kind"] == "start"]
    if not starts:
        return {"note": "This run recorded nothing about its machine."}
    changed = [name.lower() for key, name in MACHINE.items() if len({str(event.get(key)) for event in starts}) > 1]
    resumes = len(starts) - 1
    resumed = "never" if not resumes else "once" if resumes == 1 else f"{resumes:,} times"
    intro = f"Resumed {resumed}." + (f" These changed: {', '.join(changed)}." if changed else "")
    rows = [(number, start, format_duration(end - start)) for number, (start, end) in enumerate(sessions_of(run), 1)]
    return {
        "count": str(starts[-1].get("device", "")),
        "intro": intro,
        "facts": [(title, starts[-1].get(key, "–")) for key, title in MACHINE.items()],
        "rows": rows[-SHOWN_EVENTS:],
    }


def next_section(run: RunFolder) -> Context:
    """Return what can be done with the run now, as commands to copy."""
    folder, newest = shlex.quote(str(run.path)), shlex.quote(newest_checkpoint(run))
    resume = f"smollm2 train --config {shlex.quote(str(run.path / 'config.yaml'))} --save_dir {folder} --resume auto"
    is_done = status_of(run) == "finished" and run.train_steps
    kept = ", ".join(f"{path.name} ({format_bytes(size)})" for _, path, size in run.checkpoints[-12:])
    best = (run.best or {}).get("file")
    return {
        "intro": f"Checkpoints here: {kept}." if kept else "There is no checkpoint here.",
        "best": best if isinstance(best, str) else "",
        "commands": [
            ("Train further, to twice as many steps", f"{resume} --train_steps {2 * (run.train_steps or 0)}")
            if is_done
            else ("Resume the run", resume),
            ("Generate text", f'smollm2 generate {folder} --prompt "Once upon a time"'),
            ("Evaluate on a text", f"smollm2 evaluate {newest} --input_file FILE"),
            ("Export for transformers, vLLM and others", f"smollm2 export {newest} OUT"),
            ("Write this report again, or name several runs to compare them", f"smollm2 report {folder}"),
        ],
    }


SECTIONS = (
    Section("summary", "Summary", summary_section),
    Section("curves", "Curves", curves_section),
    Section("samples", "Samples", samples_section),
    Section("diagnostics", "Diagnostics", diagnostics_section),
    Section("landscape", "Landscape", landscape_section),
    Section("data", "Data", data_section),
    Section("checks", "Checks", lambda run: checks_section(run.checks, run.events), is_collapsed=True),
    Section("next", "Next", next_section),
    Section("config", "Configuration", config_section, is_collapsed=True),
    Section("machine", "Machine", machine_section, is_collapsed=True),
    Section("events", "Events", events_section, is_collapsed=True),
)
"""The sections of the page about one run, from top to bottom."""
