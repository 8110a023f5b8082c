"""Verdicts of real runs: those with a fault are named within 300 steps, sound ones never; and each verdict is reported once."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import tiny_config
from verdict_runs import CASES, run_case, verdicts_of

from smollm2.analysis.history import Facts, History
from smollm2.report.reading import read_run
from smollm2.report.verdict import notes_of
from smollm2.tracking.base import Event, Fanout, Message, Metrics
from smollm2.tracking.jsonl import JsonlTracker
from smollm2.training.loop import train
from smollm2.training.verdicts import QUIET, VerdictTracker, read_records

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"training__batch_size": 4, "training__log_interval": 5, "training__sample_tokens": 0}
SHORT = {"all zeros": 10, "adamw": 60}
"""Those that take two seconds each, and their steps; the others are slow, but for "no shift", which is resumed below."""


def problems_of(verdicts: list[dict[str, Any]]) -> dict[str, int]:
    """The first step of each problem."""
    found: dict[str, int] = {}
    for row in verdicts:
        if row["is_problem"]:
            found.setdefault(row["name"], row["step"])
    return found


@pytest.mark.parametrize("name", SHORT)
def test_short_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    found = problems_of(
        run_case(case, tmp_path, monkeypatch, training__train_steps=SHORT[name], is_long=False, **SMALL)
    )
    assert list(found) == ([case.verdict] if case.verdict else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_within_300_steps_and_a_sound_run_never(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    found = problems_of(run_case(case, tmp_path, monkeypatch))
    if not case.verdict:
        assert found == {}
    else:
        assert next(iter(found)) == case.verdict and found[case.verdict] <= 300


def events(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in verdicts_of(folder)]


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed after the verdict, and before it."""
    steps = {"training__train_steps": 120, "training__save_interval": 40, "training__keep_last": 9}
    run_case(CASES["no shift"], tmp_path, monkeypatch, **steps, is_long=False, **SMALL)
    folder = tmp_path / "checkpoints"
    whole = events(folder)
    assert [row["name"] for row in whole if row["is_problem"]] == ["leak"] and len(whole) > 1
    (step,) = [row["step"] for row in whole if row["is_problem"]]
    assert 40 < step < 80
    for left in (80, 40):
        for path in folder.glob("step_*.pt"):
            if int(path.stem[5:]) > left:
                path.unlink()
        flags = {**CASES["no shift"].flags, **steps, **SMALL}
        train(tiny_config(tmp_path, **flags), resume="auto", quiet=True)
        assert events(folder) == whole


def test_the_report_lists_the_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_case(CASES["all zeros"], tmp_path, monkeypatch, training__train_steps=10, is_long=False, **SMALL)
    assert any(
        "nearly every token of the text is the same" in note for note in notes_of(read_run(tmp_path / "checkpoints"))
    )


class Recorder(JsonlTracker):
    """The files of a run folder, and the events in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 0, print)
        self.events: list[Event] = []

    def on(self, message: Message) -> None:
        super().on(message)
        if isinstance(message.content, Event):
            self.events.append(message.content)


LOSSES = {"uniform": 5.5, "unigram": 3.3, "bigram": 2.6, "trigram": 2.0, "5-gram": 1.6}


def row(step: int, loss: float) -> Message:
    values = {"loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": 0.1}
    return Message(step, Metrics(values))


def test_a_verdict_is_reported_again_only_after_it_had_stopped_being_true(tmp_path: Path) -> None:
    rows = Recorder(tmp_path)
    tracker = VerdictTracker(Facts(), Fanout([rows]), print)
    tracker.on(Message(0, Event("baselines", "", {"losses": LOSSES})))
    leaking, sound = [0.1] * 10, [2.0]
    for number, loss in enumerate((leaking + sound) * 3 + sound * (QUIET + 1) + leaking):
        tracker.on(row(number + 1, loss))
    assert [event.details["name"] for event in rows.events] == ["leak", "leak"]
    assert rows.events[0].text.startswith("step 5: the loss is below anything that the text allows: 0.100")


def test_an_error_in_a_rule_turns_verdicts_off_and_is_reported(tmp_path: Path) -> None:
    reported: list[str] = []
    tracker = VerdictTracker(Facts(), Fanout([]), reported.append)
    tracker.on(Message(0, Event("baselines", "", {"losses": {"uniform": 1.0}})))
    tracker.on(row(1, 2.0))
    assert reported == ["verdicts: turned off after an error (KeyError: 'unigram'). The run continues."]


def test_damaged_files_are_read_as_far_as_they_are_sound(tmp_path: Path) -> None:
    lines = ['{"step": 1, "kind": "baselines", "losses": 3}', "{", '{"step": 2}', "[]"]
    for name in ("events", "metrics", "samples", "diagnostics"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, json.dumps({"step": 3, "loss": 1.0})]) + "\n")
    history = History(Facts())
    for message in read_records(tmp_path):
        history.add(message)
    assert history.training == [] and history.baselines == {}
