"""What a page about one run is made of: each section a function from the run folder to a piece of HTML.

A new section is a function here and a line in `SECTIONS`. A chart is a figure that holds its own data; report.js draws
it.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from smollm2.formatting import format_bytes, format_count, format_duration, format_number
from smollm2.report.charts import draw_curves
from smollm2.report.curves import pick_evenly, shorten, tail_mean
from smollm2.report.inside import inside_section
from smollm2.report.markup import (
    Markup,
    choices,
    clip,
    data_of,
    facts,
    figure,
    folded,
    note,
    show,
    show_time,
    table,
)
from smollm2.report.reading import RunFolder, Setting
from smollm2.report.verdict import best_of, count_of, median_of, status_of, verdict_of

SHOWN_SAMPLES = 300_000
SHOWN_PROMPTS = 24
SHOWN_EVENTS = 300


class Section(NamedTuple):
    """One part of a page: the address within it, the heading, and what is below."""

    id: str
    title: str
    build: Callable[[RunFolder], str]


def verdict_section(run: RunFolder) -> str:
    """What became of the run, and its numbers."""
    first, *others = verdict_of(run)
    word = status_of(run) if run.last_step else "empty"
    return (
        f'<p class="state" data-state="{word.replace(" ", "-")}">{show(word)}</p><p class="verdict">{show(first)} '
        f"{show(' '.join(others))}</p>{facts(key_figures(run), 'tiles')}{list_problems(run.problems)}"
    )


def list_problems(problems: Sequence[str]) -> str:
    """What is missing on the page, and why."""
    items = "".join(f"<li>{show(problem)}</li>" for problem in problems)
    return f'<div class="problems"><h3>Not everything could be read</h3><ul>{items}</ul></div>' if items else ""


def key_figures(run: RunFolder) -> list[tuple[str, str]]:
    """The numbers that a person asks for first."""
    losses = [loss for _, loss in run.points("loss")]
    validation, bits = best_of(run, "validation_loss"), best_of(run, "validation_bpb")
    tokens = max((value for _, value in run.points("tokens")), default=math.nan)
    rate = median_of([value for _, value in run.points("tokens_per_second")])
    seconds = sum(end - start for start, end in sessions_of(run))
    return [
        ("Training loss", format_number(tail_mean(losses), "{:.3f}") if losses else "–"),
        ("Best validation loss", f"{validation[1]:.3f}" if validation else "–"),
        ("Bits per byte", f"{bits[1]:.3f}" if bits else "–"),
        ("Tokens seen", "–" if math.isnan(tokens) else format_count(tokens)),
        ("Tokens a second", "–" if math.isnan(rate) else f"{rate:,.0f}"),
        ("Time", format_duration(seconds) if seconds else "–"),
    ]


def curves_section(run: RunFolder) -> str:
    """Loss, rate, gradient and speed."""
    return draw_curves([run])


def samples_section(run: RunFolder) -> str:
    """What the model wrote after the same prompts as it learned."""
    rounds: dict[int, list[tuple[str, str]]] = {}
    for row in run.samples:
        rounds.setdefault(row["step"], []).append((clip(row["prompt"], 500), clip(row["text"])))
    if not rounds:
        return note("No sample was drawn yet: training.sample_interval and training.sample_tokens say when.")
    steps = thin_rounds(rounds)
    data = [{"step": step, "samples": rounds[step][:SHOWN_PROMPTS]} for step in steps]
    left = f" {len(rounds) - len(steps)} rounds between are left out here." if len(steps) < len(rounds) else ""
    intro = f"{count_of(len(rounds), 'round')} of samples.{left} The prompt is set apart; what follows is the model's."
    cards = "".join(
        f'<article class="card"><h4>{show(prompt) if prompt else "<i>no prompt</i>"}</h4>'
        f'<p class="text"><b>{show(prompt)}</b><span>{show(text)}</span></p></article>'
        for prompt, text in rounds[steps[-1]][:SHOWN_PROMPTS]
    )
    slider = (
        '<form class="toolbar" aria-label="Which samples are shown">'
        f'<label class="slider">Update<input type="range" name="round" min="0" max="{len(steps) - 1}" step="1" '
        f'value="{len(steps) - 1}"><output name="shown" aria-live="polite">{steps[-1]:,}</output></label>'
        '<span><button type="button" data-move="-1">Earlier</button> '
        '<button type="button" data-move="1">Later</button></span></form>'
    )
    return f'<p>{show(intro)}</p><div data-samples>{slider}<div class="cards">{cards}</div>{data_of(data)}</div>'


def thin_rounds(rounds: Mapping[int, Sequence[tuple[str, str]]]) -> list[int]:
    """The steps of the rounds that a page has room for: the first, the last, and what lies evenly between."""
    steps = sorted(rounds)
    size = sum(len(prompt) + len(text) for samples in rounds.values() for prompt, text in samples[:SHOWN_PROMPTS])
    room = max(2, min(len(steps), 200, round(len(steps) * SHOWN_SAMPLES / max(1, size))))
    return pick_evenly(steps, room)


def landscape_section(run: RunFolder) -> str:
    """The loss around the weights: a surface to turn, and a line."""
    if run.landscape is None:
        command = f"smollm2 landscape {shlex.quote(newest_checkpoint(run))}"
        return note(f"No landscape was measured. To have one: {command}, then this report again.")
    step, land = run.landscape
    intro = (
        f"Loss around the weights of update {step:,} along two random filter-normalized directions (Li et al. 2018), on "
        f"{land.targets:,} tokens: {land.loss:.4f} at the weights themselves."
    )
    around = [value for row in land.grid for value in row if not math.isnan(value)]
    line = [(at, value) for at, value in zip(land.line_at, land.line, strict=True) if not math.isnan(value)]
    charts = ""
    if around:
        low, high = min(around), max(around)
        summary = f"Lowest {low:.4g}, highest {high:.4g}. Drag it to turn it."
        grid = [[None if math.isnan(value) else shorten(value) for value in row] for row in land.grid]
        form = (
            '<form class="toolbar" aria-label="How the landscape is drawn">'
            f"{choices('form', 'As', ('surface', 'map'))}</form>"
        )
        data = {"at": [shorten(at) for at in land.grid_at], "grid": grid, "loss": shorten(land.loss)}
        charts += figure("surface", "Along two directions", summary, data, form)
    if line:
        at, low = min(line, key=lambda point: point[1])
        summary = f"Lowest {low:.4g} at {at:.3g}; {line[0][1]:.4g} at {line[0][0]:.3g} and {line[-1][1]:.4g} at {line[-1][0]:.3g}."
        data = {"at": [shorten(at) for at, _ in line], "line": [shorten(value) for _, value in line], "loss": land.loss}
        charts += figure("line", "Along the first direction", summary, data)
    rows = [(f"{at:.3g}", f"{value:.4f}") for at, value in line]
    numbers = folded("Numbers of the line", table(("Distance", "Loss"), rows, "Loss along the line", numeric=True))
    return f'<p>{show(intro)}</p><div class="charts">{charts}</div>{numbers}'


def newest_checkpoint(run: RunFolder) -> str:
    """Its path, as a person would type it."""
    return str(run.checkpoints[-1][1]) if run.checkpoints else f"{run.path}/step_XXXX.pt"


def data_section(run: RunFolder) -> str:
    """What was read, and how much of it the run uses."""
    event = run.latest("data")
    if event is None:
        return note("This run left no word about its data.")

    numbers = {
        name: value for name, value in event.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }

    def number(name: str, form: str = "{:,.0f}") -> str:
        return form.format(numbers[name]) if name in numbers else "–"

    def ratio(top: str, bottom: str) -> float:
        return float(numbers[top]) / float(numbers[bottom]) if top in numbers and numbers.get(bottom) else math.nan

    used, unknown = ratio("tokens_used", "train_tokens"), ratio("unknown_bytes", "bytes")
    rows: list[tuple[str, object]] = [
        ("Source", event.get("input", "–")),
        ("Size", f"{number('bytes')} bytes, {number('characters')} characters"),
        (
            "Documents",
            f"{number('documents')}, {format_number(ratio('tokens', 'documents'), '{:,.0f}')} tokens each on average",
        ),
        ("Tokenizer", f"{event.get('tokenizer', '–')}, {number('vocab_size')} entries"),
        ("Tokens", f"{number('tokens')}, {format_number(ratio('characters', 'tokens'), '{:.2f}')} characters each"),
        (
            "Not expressed",
            f"{format_number(unknown, '{:.2%}')} of the bytes, in {number('unknown_documents')} documents",
        ),
        ("To train on", f"{number('train_tokens')} tokens in {number('windows')} windows of {number('window_tokens')}"),
        ("To validate", f"{number('validation_tokens')} tokens"),
        ("Epochs", f"{number('epochs', '{:.2f}')} by the end of the run"),
    ]
    if math.isnan(used):
        return facts(rows)
    share = min(1.0, max(0.0, used))
    bar = (
        f'<p class="coverage"><span>{used:.2%} of the training tokens are in a window</span>'
        f'<meter min="0" max="1" value="{share:.4f}" aria-label="Share of the training tokens that are used">'
        f"{used:.2%}</meter></p>"
    )
    return bar + facts(rows)


def events_section(run: RunFolder) -> str:
    """What happened besides updates."""
    events = [event for event in run.events if event["kind"] != "data"]
    if not events:
        return note("Nothing happened besides updates.")
    kinds: dict[str, int] = {}
    for event in events:
        kinds[event["kind"]] = kinds.get(event["kind"], 0) + 1
    # Where there are too many, checkpoints give way first: they are regular.
    rare = [event for event in events if event["kind"] != "checkpoint"][-SHOWN_EVENTS:]
    usual = [event for event in events if event["kind"] == "checkpoint"]
    usual = usual[-max(20, SHOWN_EVENTS - len(rare)) :]
    shown = sorted([*rare, *usual], key=lambda event: event["step"])
    left = f" {len(events) - len(shown):,} older ones are in events.jsonl." if len(shown) < len(events) else ""
    counts = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in sorted(kinds.items()))
    rows = [
        (
            f"{event['step']:,}",
            event["kind"].replace("_", " "),
            clip(describe_event(event), 600),
            show_time(event["time"]),
        )
        for event in reversed(shown)
    ]
    header = ("After update", "What", "Said", "When (UTC)")
    return f"<p>{show(counts)}.{show(left)}</p>{table(header, rows, 'Events, the newest first')}"


def describe_event(event: Mapping[str, object]) -> str:
    """What was said, or what the event's details say."""
    if event["message"]:
        return str(event["message"])
    if event["kind"] == "start":
        return f"on {event.get('device', 'a device that is not named')}"
    if event["kind"] == "done":
        return "the last update"
    return str(event.get("reason", ""))


def config_section(run: RunFolder) -> str:
    """Every value, where it came from, and which are the defaults."""
    if not run.settings:
        return note("There is no config.yaml to read.")
    given = sum(not setting.is_default for setting in run.settings.values())
    rows = list_settings(run.settings)
    form = (
        '<form class="toolbar" aria-label="Which values are shown"><label class="check">'
        '<input type="checkbox" name="given"><span>Only what was set</span></label></form>'
    )
    intro = (
        f"{len(run.settings)} values: {given} were set, {len(run.settings) - given} are defaults or follow from others."
    )
    return (
        f"<p>{show(intro)}</p><div data-settings>{form}{table(('Key', 'Value', 'From'), rows, 'Configuration')}</div>"
    )


def list_settings(settings: Mapping[str, Setting]) -> list[Sequence[object]]:
    """A row for each key."""
    return [
        (
            Markup(f"<code>{show(key, 200)}</code>"),
            Markup(f"<code>{show(setting.value, 2000)}</code>"),
            show_origin(setting),
        )
        for key, setting in settings.items()
    ]


def show_origin(setting: Setting) -> Markup:
    """Where a value came from."""
    origin = show(setting.origin or "default", 500)
    return Markup(f'<span class="default">{origin}</span>' if setting.is_default else origin)


def sessions_of(run: RunFolder) -> list[tuple[float, float]]:
    """When each process of the run began, and when it was last heard of."""
    sessions: list[tuple[float, float]] = []
    for event in run.events:
        if math.isnan(event["time"]):
            continue
        if event["kind"] == "start":
            sessions.append((event["time"], event["time"]))
        elif sessions:
            sessions[-1] = (sessions[-1][0], max(sessions[-1][1], event["time"]))
    return sessions


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


def machine_section(run: RunFolder) -> str:
    """On what the run ran, and for how long."""
    starts = [event for event in run.events if event["kind"] == "start"]
    if not starts:
        return note("This run left no word about its machine.")
    differing = [key for key in MACHINE if len({str(event.get(key)) for event in starts}) > 1]
    changed = f" It changed on the way: {', '.join(MACHINE[key].lower() for key in differing)}." if differing else ""
    rows = [
        (f"{number}", show_time(start), format_duration(end - start))
        for number, (start, end) in enumerate(sessions_of(run), 1)
    ]
    header = ("Process", "Began (UTC)", "Until it was last heard of")
    turns = ", one after the other" if len(starts) > 1 else ""
    intro = f"{count_of(len(starts), 'process', 'processes')} worked on this run{turns}.{changed}"
    shown = facts((title, starts[-1].get(key, "–")) for key, title in MACHINE.items())
    return f"<p>{show(intro)}</p>{shown}{table(header, rows[-SHOWN_EVENTS:], 'Processes of this run')}"


def next_section(run: RunFolder) -> str:
    """What to do with the run now, as commands to copy."""
    folder, newest = shlex.quote(str(run.path)), shlex.quote(newest_checkpoint(run))
    resume = f"smollm2 train --config {shlex.quote(str(run.path / 'config.yaml'))} --save_dir {folder} --resume auto"
    steps = run.train_steps
    commands = [
        ("Go on where it stopped", resume)
        if status_of(run) != "finished" or not steps
        else ("Train on, to twice as many updates", f"{resume} --train_steps {2 * steps}"),
        ("Let it write", f'smollm2 generate {folder} --prompt "Once upon a time"'),
        ("Score it on a text", f"smollm2 evaluate {newest} --input_file FILE"),
        ("Export it for transformers, vLLM and others", f"smollm2 export {newest} OUT"),
        ("Build this report again, or compare it with another run", f"smollm2 report {folder}"),
    ]
    items = "".join(
        f'<li><h3>{show(title)}</h3><div class="command"><code tabindex="0">{show(command)}</code>'
        f'<button type="button" data-copy aria-label="Copy: {show(title)}">Copy</button></div></li>'
        for title, command in commands
    )
    kept = ", ".join(f"{path.name} ({format_bytes(size)})" for _, path, size in run.checkpoints[-12:])
    best = run.best.get("file") if run.best else None
    intro = f"Checkpoints here: {kept}." if kept else "There is no checkpoint here."
    intro += f" The best by validation is {best}." if isinstance(best, str) else ""
    return f'<p>{show(intro)}</p><ol class="commands">{items}</ol><p class="hidden" role="status" data-said></p>'


SECTIONS = (
    Section("verdict", "Verdict", verdict_section),
    Section("curves", "Curves", curves_section),
    Section("samples", "Samples", samples_section),
    Section("inside", "Inside", inside_section),
    Section("landscape", "Landscape", landscape_section),
    Section("data", "Data", data_section),
    Section("events", "Events", events_section),
    Section("config", "Configuration", config_section),
    Section("machine", "Machine", machine_section),
    Section("next", "Next", next_section),
)
"""The page of one run, from top to bottom."""
