"""The rules of the verdicts, each on records at both sides of its limit."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from smollm2.analysis.history import Facts, History
from smollm2.analysis.verdicts import judge, loop_of
from smollm2.tracking.base import Diagnosis, Event, Message, Metrics, Sample, Samples

LOSSES = {"uniform": 5.5, "unigram": 3.3, "bigram": 2.6, "trigram": 2.0, "5-gram": 1.6}
BASELINES = Message(0, Event("baselines", "", {"losses": LOSSES}))
Loss = Callable[[int], float]


def training(loss: Loss, steps: int, interval: int = 10, *, rate: float = 1e-3, epoch: float = 0.5) -> list[Message]:
    """Reports of a run whose noise has a standard deviation of 0.05."""
    noise = random.Random(0)
    rows = {"learning_rate": rate, "grad_norm": 1.0, "epoch": epoch}
    return [
        Message(step, Metrics({"loss": loss(step) + noise.gauss(0, 0.05), **rows}))
        for step in range(interval, steps + 1, interval)
    ]


def validation(*losses: float, windows: int = 8) -> list[Message]:
    """Validations after steps 100, 200, ..."""
    return [
        Message(100 * (n + 1), Metrics({"validation_loss": loss, "validation_windows": windows}))
        for n, loss in enumerate(losses)
    ]


def names(messages: Iterable[Message], facts: Facts | None = None) -> set[str]:
    """The names of the verdicts after these messages, logged in the order of their steps."""
    history = History(facts or Facts())
    for message in sorted(messages, key=lambda one: one.step):
        history.add(message)
    return {verdict.name for verdict in judge(history)}


def fall(step: int) -> float:
    return 2 + 3.5 * math.exp(-step / 60)


def jump(step: int) -> float:
    return fall(step) if step < 100 else 4.5


def spike(step: int) -> float:
    return 5.0 if 100 <= step < 130 else fall(step)


FINE_TUNED = Facts(is_from_scratch=False)


@pytest.mark.parametrize(
    ("loss", "steps", "facts", "found"),
    [
        (fall, 300, Facts(), set()),
        (spike, 150, Facts(), set()),
        (spike, 300, Facts(), set()),
        (jump, 120, Facts(), set()),
        (jump, 150, Facts(), {"learning rate"}),
        (jump, 150, FINE_TUNED, set()),
        (jump, 150, Facts(is_mixed_in_stages=True), set()),
        (lambda step: fall(step) if step < 200 else 2.4, 300, Facts(), set()),  # less than a quarter is lost
        (lambda step: 5.5 + step / 50, 100, Facts(), {"learning rate"}),
        (lambda step: 5.55, 200, Facts(), set()),  # initial weights are a little worse than guesses
    ],
)
def test_a_loss_that_rose_and_stays_is_the_learning_rate(loss: Loss, steps: int, facts: Facts, found: set[str]) -> None:
    assert names([BASELINES, *training(loss, steps)], facts) == found


@pytest.mark.parametrize("interval", [1, 10, 50])
def test_it_is_found_at_any_interval_of_reports(interval: int) -> None:
    late = [*training(fall, 200, interval), *training(lambda step: 4.5, 600, interval)]
    assert names([BASELINES, *late[: 200 // interval], *late[400 // interval :]]) == {"learning rate"}
    assert names([BASELINES, *training(fall, 600, interval)]) == set()


@pytest.mark.parametrize(
    ("loss", "steps", "warmup", "validations", "found"),
    [
        (3.32, 320, 10, (), {"floor"}),
        (3.32, 290, 10, (), set()),
        (3.32, 320, 100, (), set()),  # the warmup is not over for long enough
        (3.32, 320, 10, (3.25,), {"passed unigram"}),  # which needs the order of tokens
        (3.6, 320, 10, (), set()),
        (5.5, 320, 10, (), {"floor"}),
    ],
)
def test_a_loss_that_stays_at_a_floor_is_named(
    loss: float, steps: int, warmup: int, validations: tuple[float, ...], found: set[str]
) -> None:
    messages = [BASELINES, *training(lambda step: loss, steps), *validation(*validations)]
    assert names(messages, Facts(warmup_steps=warmup)) == found


def test_a_slow_fall_is_no_floor_and_nor_is_the_best_that_the_text_allows() -> None:
    assert names([BASELINES, *training(lambda step: 3.4 - step / 3000, 320)], Facts(warmup_steps=10)) == set()
    flat = Message(0, Event("baselines", "", {"losses": {**LOSSES, "bigram": 3.2}}))
    assert names([flat, *training(lambda step: 3.3, 320)], Facts(warmup_steps=10)) == set()


@pytest.mark.parametrize(
    ("loss", "epoch", "change", "found"),
    [
        (0.2, 0.5, {}, {"leak"}),
        (0.7, 0.5, {}, set()),
        (0.2, 1.5, {}, set()),
        (0.2, 0.5, {"is_from_scratch": False}, set()),
        (0.2, 0.5, {"is_chat": True}, set()),
        (0.2, 0.5, {"is_repetitive": True}, set()),
        (0.2, 0.5, {"is_validated_elsewhere": True}, set()),
    ],
)
def test_a_loss_far_below_the_5_gram_is_a_leak(
    loss: float, epoch: float, change: dict[str, bool], found: set[str]
) -> None:
    messages = [BASELINES, *training(lambda step: loss, 50, epoch=epoch)]
    assert names(messages, replace(Facts(), **change)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("validations", "epoch", "found"),
    [
        ((3.9, 3.95, 3.96, 4.0), 3.0, {"overfitting"}),
        ((3.9, 3.95, 3.96, 4.0), 0.9, set()),
        ((4.0, 3.9, 3.95, 4.0), 3.0, set()),
        ((3.9, 3.95, 4.0, 3.96), 3.0, set()),
        ((3.9, 3.95, 3.91, 4.0), 3.0, set()),
        ((0.1, 0.11, 0.12, 0.13), 3.0, {"passed 5-gram"}),  # next to nothing
    ],
)
def test_three_validations_above_the_lowest_are_overfitting(
    validations: tuple[float, ...], epoch: float, found: set[str]
) -> None:
    assert names([BASELINES, *training(fall, 400, epoch=epoch), *validation(*validations)]) == found


def test_a_validation_on_other_windows_is_not_compared() -> None:
    messages = [*training(fall, 400, epoch=3.0), *validation(3.9, 3.95, 3.96)]
    last = Message(400, Metrics({"validation_loss": 4.1, "validation_windows": 100}))
    assert names([BASELINES, *messages, last]) == set()


def diagnosis(step: int, *, gradient: float = 1.0, ratio: float = 0.01, logit: float = 9.0) -> Message:
    """One block whose parameter `a` may be still."""
    ones, activations = {"a": gradient, "b": 1.0}, {"layers.0": {"max_attention_logit": logit}}
    return Message(step, Diagnosis(ones, {"a": 1.0, "b": 1.0}, {"a": ratio, "b": 0.01}, activations, 0.0))


@pytest.mark.parametrize(
    ("diagnoses", "rate", "found"),
    [
        ([diagnosis(50, gradient=0), diagnosis(100, gradient=0)], 1e-3, {"untrained"}),
        ([diagnosis(50, ratio=0), diagnosis(100, ratio=0)], 1e-3, {"untrained"}),
        ([diagnosis(50, ratio=0), diagnosis(100, ratio=0)], 1e-8, set()),  # rounding hides the update
        ([diagnosis(1, gradient=0), diagnosis(100, gradient=0)], 1e-3, set()),  # initial weights may be 0
        ([diagnosis(50), diagnosis(100, gradient=0)], 1e-3, set()),
        ([diagnosis(50, logit=600), diagnosis(100, logit=700)], 1e-3, {"learning rate"}),
        ([diagnosis(50, logit=60), diagnosis(100, logit=700)], 1e-3, set()),
    ],
)
def test_two_diagnoses_in_a_row_decide(diagnoses: list[Message], rate: float, found: set[str]) -> None:
    assert names([BASELINES, *training(fall, 100, rate=rate), *diagnoses]) == found


def samples(step: int, *texts: str) -> Message:
    return Message(step, Samples([Sample("The", text) for text in texts]))


def test_samples_that_all_loop_twice_are_named() -> None:
    loops, fine = ("so the" + " the" * 12, "a" * 12), ("so the man went home at last", "a" * 12)
    assert names([BASELINES, samples(100, *loops), samples(200, *loops)]) == {"loops"}
    assert names([BASELINES, samples(100, *loops), samples(200, *fine)]) == set()
    easy = Message(0, Event("baselines", "", {"losses": dict.fromkeys(LOSSES, 0.3)}))
    assert names([easy, samples(100, *loops), samples(200, *loops)]) == set()


@pytest.mark.parametrize(
    ("text", "unit"),
    [("x " + "ab" * 9, "ab"), ("abcabc", ""), ("", ""), ("never the same again", ""), ("zzzzzzzz", "z")],
)
def test_a_loop_is_found_at_the_end(text: str, unit: str) -> None:
    assert sorted(loop_of(text)) == sorted(unit)


def test_text_of_one_token_is_named_before_the_first_step() -> None:
    assert names([Message(0, Event("baselines", "", {"losses": dict.fromkeys(LOSSES, 0.001)}))]) == {"one token"}


def test_the_lowest_baseline_that_was_passed_is_noted() -> None:
    assert names([BASELINES, *validation(4.0, 3.0)]) == {"passed unigram"}
    assert names([BASELINES, *validation(4.0, 1.9, 3.0)]) == {"passed trigram"}


@pytest.mark.parametrize(
    ("changes", "loss", "found"),
    [
        ({"trigram": 10.5, "5-gram": 8.7}, 5.8, set()),  # above a guess
        ({"trigram": 10.5, "5-gram": 8.7}, 3.0, {"passed unigram"}),
        ({"trigram": 10.5, "5-gram": 8.7}, 2.5, {"passed 5-gram"}),
        ({"5-gram": 2.1}, 2.05, {"passed bigram"}),
    ],
)
def test_a_baseline_that_is_worse_than_a_simpler_one_tells_nothing(
    changes: dict[str, float], loss: float, found: set[str]
) -> None:
    poor = Message(0, Event("baselines", "", {"losses": {**LOSSES, **changes}}))
    assert names([poor, *validation(loss)]) == found


def test_a_loss_that_falls_after_the_warmup_is_fine() -> None:
    facts = Facts(warmup_steps=20)
    assert names([BASELINES, *training(fall, 120)], facts) == {"warmup"}
    assert names([BASELINES, *training(fall, 110)], facts) == set()
    assert names([BASELINES, *training(fall, 500)], facts) == set()
    assert names([BASELINES, *training(lambda step: 2.0, 120)], facts) == set()


def test_a_record_that_is_not_finite_is_left_out() -> None:
    broken = [
        Message(step, Metrics({"loss": math.nan, "learning_rate": 1.0, "grad_norm": math.inf})) for step in (101, 102)
    ]
    assert names([BASELINES, *training(fall, 300), *broken]) == set()
