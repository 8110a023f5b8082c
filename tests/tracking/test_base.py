import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smollm2.tracking.base import Diagnosis, Fanout, Fence, Landscape, Sample, describe, escape_controls


class Recorder:
    """A tracker that keeps what it hears, and fails as often as it is told to."""

    def __init__(self, failures: int = 0, error: BaseException | None = None) -> None:
        self.heard: list[object] = []
        self.failures = failures
        self.error = error or RuntimeError("no\nluck")

    def hear(self, what: object) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.heard.append(what)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        self.hear((dict(metrics), step))

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        self.hear((tuple(samples), step))

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        self.hear((kind, message, step, details))

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        self.hear((diagnosis, step))

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        self.hear((landscape, step))

    def save_file(self, path: Path, step: int, *, is_best: bool) -> None:
        self.hear((path, step, is_best))

    def close(self) -> None:
        self.hear("closed")


DIAGNOSIS = Diagnosis({"w": 1.0}, {"w": 2.0}, {"w": 0.5}, {}, clipped=0.0)
LANDSCAPE = Landscape(1.0, (-1, 0, 1), (2.0, 1.0, 2.0), (0,), ((1.0,),), seed=0, targets=8)
EVERYTHING = [
    ({"loss": 1.0}, 1),
    ((Sample("a", "b"),), 2),
    ("skip", "skipped", 3, {"why": "nan"}),
    (DIAGNOSIS, 4),
    (LANDSCAPE, 5),
    (Path("step_0006.pt"), 6, True),
    "closed",
]


def tell_everything(tracker: Fence | Fanout) -> None:
    tracker.log({"loss": 1.0}, 1)
    tracker.log_text([Sample("a", "b")], 2)
    tracker.log_event("skip", "skipped", 3, why="nan")
    tracker.log_diagnosis(DIAGNOSIS, 4)
    tracker.log_landscape(LANDSCAPE, 5)
    tracker.save_file(Path("step_0006.pt"), 6, is_best=True)
    tracker.close()


def test_a_fanout_tells_each_tracker_everything() -> None:
    trackers = [Recorder(), Recorder()]
    tell_everything(Fanout(trackers))
    assert [tracker.heard for tracker in trackers] == [EVERYTHING, EVERYTHING]


def test_the_seconds_spent_in_trackers_are_counted() -> None:
    class Slow(Recorder):
        def hear(self, what: object) -> None:
            time.sleep(0.01)

    tracker = Fanout([Slow()])
    tracker.log({"loss": 1.0}, 1)
    with tracker.counted():
        time.sleep(0.01)
    assert 0.02 <= tracker.seconds < 1


def test_what_a_fenced_tracker_computes_is_counted_and_its_waiting_is_not() -> None:
    class Busy(Recorder):
        def hear(self, what: object) -> None:
            time.sleep(0.2)
            end = time.thread_time() + 0.05
            while time.thread_time() < end:
                pass

    fence = Fence("Mirror", Busy, print)
    tracker = Fanout([fence, Recorder()])
    tracker.log({"loss": 1.0}, 1)
    fence.close()
    assert 0.05 <= tracker.seconds < 0.15


def test_a_fence_asks_in_line_what_stands_in_for_a_file() -> None:
    go, tracker = threading.Event(), Recorder()

    def wait() -> Recorder:
        go.wait()
        return tracker

    asked: list[tuple[Path, bool]] = []

    def keep(path: Path, is_best: bool) -> Path | None:
        asked.append((path, is_best))
        return path.with_suffix(".link") if is_best else None

    fence = Fence("Mirror", wait, print, keep_file=keep)
    fence.save_file(Path("a.pt"), 1, is_best=False)
    fence.save_file(Path("b.pt"), 2, is_best=True)
    assert asked == [(Path("a.pt"), False), (Path("b.pt"), True)]
    go.set()
    fence.close()
    assert tracker.heard == [(Path("b.link"), 2, True), "closed"]


def test_a_fenced_tracker_hears_everything_in_order() -> None:
    tracker, said = Recorder(), list[str]()
    tell_everything(Fence("Mirror", lambda: tracker, said.append))
    assert tracker.heard == EVERYTHING and said == []


def test_a_fenced_tracker_hears_the_numbers_of_the_moment_it_was_told() -> None:
    tracker, metrics = Recorder(), {"loss": 1.0}
    fence = Fence("Mirror", lambda: tracker, print)
    fence.log(metrics, 1)
    metrics["loss"] = 2.0
    fence.close()
    assert tracker.heard[0] == ({"loss": 1.0}, 1)


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), SystemExit("no"), KeyboardInterrupt("no")])
@pytest.mark.parametrize(("failures", "heard"), [(0, 5), (2, 3), (3, 0), (5, 0)])
def test_a_fenced_tracker_is_off_after_three_failures(failures: int, heard: int, error: BaseException) -> None:
    tracker = Recorder(failures, error)
    fence = Fence("Mirror", lambda: tracker, lambda line: None)
    for step in range(5):
        fence.log({}, step)
    fence.close()
    assert len([entry for entry in tracker.heard if entry != "closed"]) == heard


def test_a_tracker_that_fails_is_named_once_in_one_line() -> None:
    said: list[str] = []
    fence = Fence("Mirror", lambda: Recorder(100), said.append)
    for step in range(10):
        fence.log({}, step)
    fence.close()
    assert said == ["Mirror - RuntimeError: no - it is off from here; the run folder has every row"]


def test_a_tracker_that_cannot_be_opened_is_named_once_in_one_line() -> None:
    said: list[str] = []

    def fail() -> Recorder:
        raise ImportError("broken")

    tell_everything(Fence("Mirror", fail, said.append))
    assert said == ["Mirror - ImportError: broken - it is off from here; the run folder has every row"]


def test_a_tracker_that_blocks_delays_neither_a_report_nor_the_end() -> None:
    never, said = threading.Event(), list[str]()

    def block() -> Recorder:
        never.wait()
        return Recorder()

    start = time.monotonic()
    fence = Fence("Mirror", block, said.append, capacity=3, close_seconds=0.2)
    for step in range(1000):
        fence.log({}, step)
    reported = time.monotonic() - start
    fence.close()
    assert reported < 0.2 and time.monotonic() - start < 2
    assert said == ["Mirror - did not finish within 0.2 s - it is left behind; the run folder has every row"]
    never.set()


def test_what_a_full_queue_cannot_hold_is_counted() -> None:
    go, tracker, said = threading.Event(), Recorder(), list[str]()

    def wait() -> Recorder:
        go.wait()
        return tracker

    fence = Fence("Mirror", wait, said.append, capacity=3)
    for step in range(10):
        fence.log({}, step)
    go.set()
    fence.close()
    assert [entry for entry in tracker.heard if entry != "closed"] == [({}, 0), ({}, 1), ({}, 2)]
    assert said == ["Mirror - 7 calls found its queue full - the run folder has every row"]


def test_an_error_is_described_in_one_short_line() -> None:
    assert describe(ValueError("x" * 1000 + "\nmore")) == "ValueError: " + "x" * 200
    assert describe(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Zürich, 東京, 🙂\n", "plain, Zürich, 東京, 🙂\n"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\tb\rc", "a\\tb\\rc"),
        ("abc\u202edef", "abc\\u202edef"),
        ("\udc80", "\\udc80"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert escape_controls(text) == shown


def test_line_breaks_are_shown_where_one_line_is_wanted() -> None:
    assert escape_controls("a\nb", keep_newlines=False) == "a\\nb"


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_a_control_character(text: str) -> None:
    """G6: no byte that a terminal obeys is left, and the rest stays as it is."""
    shown = escape_controls(text, keep_newlines=False)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    shown.encode("utf-8")
    assert escape_controls(shown, keep_newlines=False) == shown
