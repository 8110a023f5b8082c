"""What a page about several runs is made of: each section a function from the runs to a piece of HTML."""

from collections.abc import Sequence

from smollm2.report.charts import draw_curves
from smollm2.report.markup import Markup, clip, note, show, table
from smollm2.report.reading import RunFolder
from smollm2.report.sections import key_figures, list_problems
from smollm2.report.verdict import best_of, describe_status, status_of


def overview_section(runs: Sequence[RunFolder]) -> str:
    """What became of each run, side by side, the best value of each row marked."""
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    scores = [best_of(run, "validation_loss") for run in runs]
    best = min((score[1] for score in scores if score), default=None)
    figures = [key_figures(run) for run in runs]
    rows = []
    for run, score, shown in zip(runs, scores, figures, strict=True):
        name = Markup(f"<b>{show(run.name)}</b> (best)") if score and score[1] == best else run.name
        rows.append((name, status_of(run), f"{run.last_step:,}", *(value for _, value in shown)))
    names = [name for name, _ in figures[0]]
    unfinished = [run for run in runs if status_of(run) != "finished"]
    sentences = "".join(f"<li><b>{show(run.name)}</b> {show(describe_status(run))}</li>" for run in unfinished)
    listed = f"<ul>{sentences}</ul>" if sentences else ""
    header = ("Run", "State", "Updates", *names)
    return f"{table(header, rows, 'The runs', numeric=True)}{listed}{list_problems(problems)}"


def differences_section(runs: Sequence[RunFolder]) -> str:
    """The config keys on which the runs are not of one mind."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = []
    for key in keys:
        values = [run.settings[key].value if key in run.settings else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append((Markup(f"<code>{show(key, 200)}</code>"), *(clip(value, 500) for value in values)))
    if not rows:
        return note("The configs of these runs are the same, or there is none to read.")
    return table(("Key", *(run.name for run in runs)), rows, "Config keys that differ")


def last_samples_section(runs: Sequence[RunFolder]) -> str:
    """What each run wrote last, prompt by prompt."""
    prompts = list(dict.fromkeys(row["prompt"] for run in runs for row in run.samples))[:8]
    if not prompts:
        return note("None of these runs has samples.")
    blocks = ""
    for prompt in prompts:
        cards = ""
        for run in runs:
            row = next((row for row in reversed(run.samples) if row["prompt"] == prompt), None)
            if row:
                cards += (
                    f'<article class="card"><h4>{show(run.name)}, update {row["step"]:,}</h4>'
                    f'<p class="text">{show(row["text"], 1000)}</p></article>'
                )
        blocks += f'<h3>{show(prompt, 500) if prompt else "No prompt"}</h3><div class="cards">{cards}</div>'
    return blocks


COMPARISON = (
    ("overview", "Runs", overview_section),
    ("curves", "Curves", draw_curves),
    ("differences", "What differs", differences_section),
    ("samples", "Last samples", last_samples_section),
)
"""The page of several runs, from top to bottom."""
