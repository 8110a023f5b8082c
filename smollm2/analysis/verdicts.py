"""Verdicts on a run while it trains: rules over its records, each with at most one sentence, its reason and what to check.

A wrong alarm on a sound run is worse than a missing one, so every rule asks for a state that no sound run is in, over several
reports. The limits come from the reasons beside them.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from smollm2.analysis.history import History, TrainingReport

REPORTS = 5
"""The fewest reports that a rule on the training loss reads: a single step's loss is noise."""

FLOOR_STEPS = 300
"""Sound runs at a low learning rate stay at the level of single tokens for a while: 100 steps of 300 were measured."""

FLOOR_WIDTH = 0.05
"""How far the training loss may be from a baseline, which is measured on other text, to be at its level."""

STILL = 0.01
"""A loss that falls by less than this fraction in `FLOOR_STEPS` steps does not fall."""

RISEN_STEPS = 50
"""A loss spike is over after some steps: a loss that is still high after this many is none."""

LOST = 0.25
"""The share of what a run has learned, as a fall of its loss, that it must have lost again for the learning rate to be named."""

LEARNED = 0.1
"""The share of the first loss by which it must have fallen before that is measured: less may be noise."""

NOISE = 4
"""A difference of this many standard deviations of a report's loss is not noise."""

LEAK = 0.25
"""A share of the 5-gram baseline that no sound model reaches in its first epoch, unless the text says everything four times."""

LEAK_STEPS = 1000
"""Later, a large model may have learned so much of text as regular as tables, on which a 5-gram model is poor."""

SATURATED = 500.0
"""Next to an attention logit of this size, the softmax of one below 396 is exactly 0 in float32, and passes no gradient."""

ONE_TOKEN = 0.05
"""A unigram loss in nats below which all but 1 % of the targets are the same token; a fair coin has 0.69."""

RISE = 1.01
"""A validation loss above this multiple of the lowest one has risen; a smaller rise is noise from a few windows."""

RISEN = 0.05
"""A rise of the validation loss in nats that is worth a line, where 1 % of it is next to nothing."""

RISES = 3
"""The validations in a row that must be above the lowest."""

REPEATS = 4
"""How often a sample must repeat its end to count as a loop; once or twice is a figure of speech."""

NATURAL = 0.5
"""A loss of the 5-gram baseline, in nats, below which the text itself repeats: a loop would be a good sample of it."""

LEAST_RATE = 1e-4
"""A much smaller learning rate can leave weights near 1 unchanged in float32, whose steps there are 6e-8 to 1.2e-7: an update
is the rate times a factor that is far below 1 where gradients are mostly noise."""

CONTEXT = {
    "unigram": "it uses the order of the tokens",
    "bigram": "it uses more than the last token",
    "trigram": "it uses more than the last two tokens",
    "5-gram": "it uses more than counts of up to five tokens tell",
}
"""What a model has learned whose loss is below a baseline."""


@dataclass(frozen=True)
class Verdict:
    """A sentence about a run. `name` stays the same while it is true; a note that is no problem has `is_problem` False."""

    name: str
    text: str
    is_problem: bool = True


Rule = Callable[[History], Verdict | None]


def judge(history: History) -> list[Verdict]:
    """Return the verdicts that are true now, one of each name; the notes only if there is no problem."""
    problems = {verdict.name: verdict for rule in PROBLEMS if (verdict := rule(history))}
    notes = [verdict for rule in NOTES if (verdict := rule(history))] if not problems else []
    return [*problems.values(), *notes]


def find_one_token(history: History) -> Verdict | None:
    """The text is one token over and over: all zeros, or a file that was not what it was taken for."""
    unigram = history.baselines.get("unigram")
    if unigram is None or unigram >= ONE_TOKEN:
        return None
    return Verdict(
        "one token",
        f"nearly every token of the text is the same (unigram loss {unigram:.4f}): there is nothing to learn. Look at the input",
    )


def find_leak(history: History) -> Verdict | None:
    """The loss is below anything that can be predicted, before any text was read twice.

    Conversations are left out, because an answer can be determined by its question; a run from another model, which may
    know the text; text that repeats itself, so that it is read twice in one epoch; and a run whose baselines were measured
    on another text than the one that it reads.
    """
    facts, limit = history.facts, LEAK * history.baselines.get("5-gram", 0.0)
    last = history.recent(0, REPORTS)
    if not last or not facts.is_from_scratch or facts.is_chat or facts.is_repetitive or facts.is_validated_elsewhere:
        return None
    is_new = last[-1].epoch <= 1 and last[-1].step <= LEAK_STEPS
    if not is_new or max(report.loss for report in last) >= limit:
        return None
    return Verdict(
        "leak",
        f"the loss is below anything that the text allows: {last[-1].loss:.3f} after {last[-1].epoch:.2f} epochs, while a "
        f"5-gram model has {history.baselines['5-gram']:.2f}: the targets leak. Check that attention is causal and that "
        "labels are the tokens after the inputs",
    )


def find_floor(history: History) -> Verdict | None:
    """The loss stays at what single tokens, or none, allow, although their order tells more.

    It is read after the warmup, and only where the bigram baseline is a tenth lower: where it is not, the floor is the end.
    A validation loss below the unigram baseline, which was measured on the same windows, shows that the order is used.
    """
    last = history.recent(FLOOR_STEPS, 2 * REPORTS)
    baselines = history.baselines
    if not last or not baselines or last[0].step <= history.facts.warmup_steps:
        return None
    uses_order = any(report.loss < baselines["unigram"] for report in history.validation)
    if uses_order or baselines["bigram"] > 0.9 * baselines["unigram"]:
        return None
    halves = [mean_loss(part) for part in (last[: len(last) // 2], last[len(last) // 2 :])]
    level = next((name for name in ("unigram", "uniform") if is_at(halves, baselines[name])), "")
    if not level or halves[1] < (1 - STILL) * halves[0]:
        return None
    meaning = "the model uses single tokens only" if level == "unigram" else "the model has learned nothing"
    return Verdict(
        "floor",
        f"at the {level} floor for {FLOOR_STEPS} steps (loss {halves[1]:.2f}, {level} "
        f"{baselines[level]:.2f}): {meaning}. Check that training.learning_rate is neither too high nor too low, and that "
        "labels are the tokens after the inputs",
    )


def find_divergence(history: History) -> Verdict | None:
    """The loss rose and stays risen, or is higher than that of guesses: the steps are too large.

    A run from another model is left out, because its loss may rise at first, and so is a mixture in stages, whose text
    changes.
    """
    last, lowest = history.recent(RISEN_STEPS, REPORTS), history.lowest
    facts = history.facts
    if not last or not lowest or not facts.is_from_scratch or facts.is_mixed_in_stages:
        return None
    first, least = history.first_loss, min(report.loss for report in last)
    learned = first - lowest.loss
    has_lost = learned > LEARNED * first and least > lowest.loss + LOST * learned
    has_lost = has_lost and least > lowest.loss + NOISE * noise_of(last)
    guess = history.baselines.get("uniform", first)
    if not has_lost and least < (1 + FLOOR_WIDTH) * max(first, guess):
        return None
    begin = lowest.loss if has_lost else first
    norm = statistics.median(report.grad_norm for report in last)
    jump = f", and the gradient norm from {lowest.grad_norm:.2g} to {norm:.2g}" if norm > 2 * lowest.grad_norm else ""
    return Verdict(
        "learning rate",
        f"the learning rate may be too high: the loss rose from {begin:.2f} to {mean_loss(last):.2f} and stays there{jump}. "
        "Try a third of training.learning_rate",
    )


def find_saturation(history: History) -> Verdict | None:
    """The attention logits of two diagnoses in a row are so large that no gradient passes: the weights have blown up.

    A run from another model is left out: its weights may have been so before.
    """
    if len(history.diagnoses) < 2 or not history.facts.is_from_scratch:
        return None
    highest = [
        max((numbers.get("max_attention_logit", 0.0) for numbers in diagnosis.activations.values()), default=0.0)
        for _, diagnosis in history.diagnoses
    ]
    if min(highest) < SATURATED:
        return None
    return Verdict(
        "learning rate",
        f"the learning rate may be too high: attention logits have reached {highest[-1]:,.0f}, where the softmax is exactly 0 "
        "or 1 and passes no gradient. Try a third of training.learning_rate",
    )


def find_untrained(history: History) -> Verdict | None:
    """A parameter has a gradient of exactly 0, or does not move, twice in a row while others do.

    The first step does not count, because initial weights of 0 stop the gradients of others there; nor does a learning rate
    so low that the rounding of a weight hides its update.
    """
    if len(history.diagnoses) < 2 or not history.training:
        return None
    names: set[str] | None = None
    for step, diagnosis in history.diagnoses:
        ratios, norms = diagnosis.update_ratios, diagnosis.gradient_norms
        if step < 2 or not any(ratio > 0 for ratio in ratios.values()):
            return None
        still = {name for name, ratio in ratios.items() if ratio == 0} if is_fast(history.training[-1]) else set()
        still |= {name for name, norm in norms.items() if norm == 0}
        names = still if names is None else names & still
    if not names:
        return None
    ordered = sorted(names)
    more = f" and {len(ordered) - 1} more" if len(ordered) > 1 else ""
    return Verdict(
        "untrained",
        f"{ordered[0]}{more}: not trained, because its gradient or its update is exactly 0. Check that it is not frozen and "
        "that an optimizer has it",
    )


def find_overfitting(history: History) -> Verdict | None:
    """The last validations are all above the lowest, the last one most, while the training loss fell and text is read again."""
    last = history.validation[-RISES:]
    if len(last) < RISES or not history.training or history.training[-1].epoch <= 1:
        return None
    lowest, epoch = min(history.validation, key=lambda report: report.loss), history.training[-1].epoch
    losses = [report.loss for report in last]
    is_risen = min(losses) > RISE * lowest.loss and losses[-1] == max(losses) > lowest.loss + RISEN
    if not is_risen or not last[-1].training_loss < lowest.training_loss:
        return None
    return Verdict(
        "overfitting",
        f"validation rises since step {lowest.step:,} ({lowest.loss:.2f} -> {losses[-1]:.2f}) while the training loss falls: "
        f"{epoch:.1f} epochs over {history.facts.text}. Use more text, fewer steps or the best checkpoint",
    )


def find_loops(history: History) -> Verdict | None:
    """All samples of two rounds end in a loop, although the text does not: a 5-gram model would predict such text."""
    if len(history.samples) < 2 or history.baselines.get("5-gram", 0.0) < NATURAL:
        return None
    if not all(texts and all(loop_of(text) for text in texts) for _, texts in history.samples):
        return None
    return Verdict(
        "loops",
        f"samples repeat: all of the last two rounds end in a loop, such as {loop_of(history.samples[-1][1][0])!r}. Look "
        "at the training text for long repetitions, or train longer",
    )


def note_passed(history: History) -> Verdict | None:
    """The lowest validation loss is below a baseline, and below those that know less: what that tells.

    On a text unlike the training text, a baseline can be worse than one that knows less, and than a guess.
    """
    if not history.validation:
        return None
    loss = min(report.loss for report in history.validation)
    order = [name for name in ("uniform", *CONTEXT) if name in history.baselines]
    levels = list(accumulate((history.baselines[name] for name in order), min))
    passed = [name for name, level in zip(order, levels, strict=True) if loss < level and name in CONTEXT]
    if not passed:
        return None
    name = passed[-1]
    level = history.baselines[name]
    return Verdict(
        f"passed {name}", f"validation has passed the {name} baseline ({level:.2f}): {CONTEXT[name]}", is_problem=False
    )


def note_warmup(history: History) -> Verdict | None:
    """The first reports after the warmup show a loss that falls."""
    warmup = history.facts.warmup_steps
    after = [report for report in history.recent(RISEN_STEPS, 2 * REPORTS) if report.step > warmup]
    if (
        not warmup
        or len(after) < 2 * REPORTS
        or history.step > warmup + 2 * max(RISEN_STEPS, len(after) * history.interval)
    ):
        return None
    halves = [mean_loss(part) for part in (after[: len(after) // 2], after[len(after) // 2 :])]
    if halves[1] > halves[0] - noise_of(after):
        return None
    return Verdict("warmup", "the warmup has ended, and the loss is still falling: fine", is_problem=False)


def mean_loss(reports: Sequence[TrainingReport]) -> float:
    """Return the mean training loss of some reports."""
    return sum(report.loss for report in reports) / len(reports)


def noise_of(reports: Sequence[TrainingReport]) -> float:
    """Return the standard deviation of the losses around their trend: the median difference of two neighbours / 0.954."""
    return statistics.median(abs(b.loss - a.loss) for a, b in pairwise(reports)) / 0.954


def is_at(halves: Sequence[float], level: float) -> bool:
    """Return whether both mean losses are at a level."""
    return all(abs(loss / level - 1) < FLOOR_WIDTH for loss in halves)


def is_fast(report: TrainingReport) -> bool:
    """Return whether the learning rate is high enough to move every weight."""
    return report.learning_rate >= LEAST_RATE


def loop_of(text: str) -> str:
    """Return the shortest text that fills the last half of `text`, at least `REPEATS` times; empty if there is none."""
    end = text[len(text) // 2 :]
    for length in range(1, len(end) // REPEATS + 1):
        unit = end[-length:]
        if end == (unit * (len(end) // length + 1))[-len(end) :]:
            return unit
    return ""


PROBLEMS: Sequence[Rule] = (
    find_one_token,
    find_untrained,
    find_leak,
    find_divergence,
    find_saturation,
    find_floor,
    find_overfitting,
    find_loops,
)
NOTES: Sequence[Rule] = (note_passed, note_warmup)
