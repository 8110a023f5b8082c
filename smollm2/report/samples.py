"""The samples on the page: the latest, then the first, middle and last rounds side by side, then every round.

A round is all samples that were drawn at one step.
"""

from collections.abc import Mapping, Sequence

from smollm2.report.curves import pick_evenly
from smollm2.report.figures import Context
from smollm2.report.reading import RunFolder
from smollm2.report.templating import clip
from smollm2.report.verdict import count_of

SHOWN_CHARACTERS = 300_000
SHOWN_PROMPTS = 24

Rounds = Mapping[int, Sequence[tuple[str, str]]]
"""The samples of each step, as pairs (prompt, text)."""


def rounds_of(run: RunFolder) -> dict[int, list[tuple[str, str]]]:
    """Return the samples by step, with long prompts and texts shortened."""
    rounds: dict[int, list[tuple[str, str]]] = {}
    for row in run.samples:
        rounds.setdefault(row["step"], []).append((clip(row["prompt"], 500), clip(row["text"])))
    return rounds


def latest_sample(run: RunFolder) -> Context | None:
    """Return the sample of the first prompt at the latest step; None if there are no samples yet."""
    if not run.samples:
        return None
    step = run.samples[-1]["step"]
    row = next(row for row in run.samples if row["step"] == step)
    return {"step": step, "prompt": row["prompt"], "text": row["text"]}


def samples_section(run: RunFolder) -> Context:
    """Return what the model generated for the same prompts at different steps of training."""
    rounds = rounds_of(run)
    if not rounds:
        return {"note": "No samples yet: training.sample_interval and training.sample_tokens set when they are drawn."}
    steps = thin_rounds(rounds)
    chosen = pick_evenly(sorted(rounds), 3)
    prompts = list(dict.fromkeys(prompt for step in chosen for prompt, _ in rounds[step]))[:SHOWN_PROMPTS]
    omitted = f" {len(rounds) - len(steps)} rounds between are omitted." if len(steps) < len(rounds) else ""
    return {
        "intro": f"{count_of(len(rounds), 'round')} of samples.{omitted} The prompt is in colour; the model wrote the rest.",
        "prompts": [(prompt, [(step, dict(rounds[step]).get(prompt)) for step in chosen]) for prompt in prompts],
        "steps": steps if len(steps) > len(chosen) else [],
        "data": [{"step": step, "samples": rounds[step][:SHOWN_PROMPTS]} for step in steps],
        "last": rounds[steps[-1]][:SHOWN_PROMPTS],
    }


def thin_rounds(rounds: Rounds) -> list[int]:
    """Return the steps of the rounds that fit on a page: the first, the last, and evenly spaced ones in between."""
    steps = sorted(rounds)
    size = sum(len(prompt) + len(text) for samples in rounds.values() for prompt, text in samples[:SHOWN_PROMPTS])
    room = max(2, min(len(steps), 200, round(len(steps) * SHOWN_CHARACTERS / max(1, size))))
    return pick_evenly(steps, room)
