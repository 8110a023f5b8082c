import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smollm2.tracking.base import (
    Diagnosis,
    Event,
    Fanout,
    Fence,
    Landscape,
    Message,
    Metrics,
    Sample,
    Samples,
    SavedFile,
    Tracker,
    describe,
    escape_controls,
)


class Recorder:
    """A tracker that keeps its messages, and fails on the first `failures` of them."""

    def __init__(self, failures: int = 0, error: BaseException | None = None) -> None:
        self.received: list[object] = []
        self.failures = failures
        self.error = error or RuntimeError("no\nluck")

    def on(self, message: Message) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.received.append(message)

    def close(self) -> None:
        self.received.append("closed")


DIAGNOSIS = Diagnosis({"w": 1.0}, {"w": 2.0}, {"w": 0.5}, {}, clipped=0.0)
LANDSCAPE = Landscape(1.0, (-1, 0, 1), (2.0, 1.0, 2.0), (0,), ((1.0,),), seed=0, targets=8)
EVERYTHING = [
    Message(1, Metrics({"loss": 1.0})),
    Message(2, Samples([Sample("a", "b")])),
    Message(3, Event("skip", "skipped", {"why": "nan"})),
    Message(4, DIAGNOSIS),
    Message(5, LANDSCAPE),
    Message(6, SavedFile(Path("step_0006.pt"), True)),
    "closed",
]


def send_everything(*trackers: Tracker) -> None:
    fanout = Fanout(trackers)
    fanout.log({"loss": 1.0}, 1)
    fanout.log_text([Sample("a", "b")], 2)
    fanout.log_event("skip", "skipped", 3, why="nan")
    fanout.log_diagnosis(DIAGNOSIS, 4)
    fanout.log_landscape(LANDSCAPE, 5)
    fanout.save_file(Path("step_0006.pt"), 6, is_best=True)
    fanout.close()


def report_step(step: int) -> Message:
    return Message(step, Metrics({}))


def test_a_fanout_passes_every_message_to_each_tracker() -> None:
    trackers = [Recorder(), Recorder()]
    send_everything(*trackers)
    assert [tracker.received for tracker in trackers] == [EVERYTHING, EVERYTHING]


def test_the_seconds_spent_in_trackers_are_counted() -> None:
    class Slow(Recorder):
        def on(self, message: Message) -> None:
            time.sleep(0.01)

    tracker = Fanout([Slow()])
    tracker.log({"loss": 1.0}, 1)
    with tracker.counted():
        time.sleep(0.01)
    assert 0.02 <= tracker.seconds < 1


def test_the_cpu_time_of_a_fenced_tracker_is_counted_and_its_waiting_is_not() -> None:
    class Busy(Recorder):
        def on(self, message: Message) -> None:
            time.sleep(0.2)
            end = time.thread_time() + 0.05
            while time.thread_time() < end:
                pass

    fence = Fence("W&B", Busy, print)
    tracker = Fanout([fence, Recorder()])
    tracker.log({"loss": 1.0}, 1)
    fence.close()
    assert 0.05 <= tracker.seconds < 0.15


def test_a_fence_asks_in_line_which_file_to_keep() -> None:
    go, tracker = threading.Event(), Recorder()

    def wait() -> Recorder:
        go.wait()
        return tracker

    asked: list[tuple[Path, bool]] = []

    def keep(path: Path, is_best: bool) -> Path | None:
        asked.append((path, is_best))
        return path.with_suffix(".link") if is_best else None

    fence = Fence("W&B", wait, print, keep_file=keep)
    fence.on(Message(1, SavedFile(Path("a.pt"), False)))
    fence.on(Message(2, SavedFile(Path("b.pt"), True)))
    assert asked == [(Path("a.pt"), False), (Path("b.pt"), True)]
    go.set()
    fence.close()
    assert tracker.received == [Message(2, SavedFile(Path("b.link"), True)), "closed"]


def test_a_fenced_tracker_receives_everything_in_order() -> None:
    tracker, reported = Recorder(), list[str]()
    send_everything(Fence("W&B", lambda: tracker, reported.append))
    assert tracker.received == EVERYTHING and reported == []


def test_a_fenced_tracker_receives_the_numbers_as_they_were_logged() -> None:
    tracker, metrics = Recorder(), {"loss": 1.0}
    fence = Fence("W&B", lambda: tracker, print)
    fence.on(Message(1, Metrics(metrics)))
    metrics["loss"] = 2.0
    fence.close()
    assert tracker.received[0] == Message(1, Metrics({"loss": 1.0}))


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), SystemExit("no"), KeyboardInterrupt("no")])
@pytest.mark.parametrize(("failures", "received"), [(0, 5), (2, 3), (3, 0), (5, 0)])
def test_a_fenced_tracker_is_off_after_three_failures(failures: int, received: int, error: BaseException) -> None:
    tracker = Recorder(failures, error)
    fence = Fence("W&B", lambda: tracker, lambda line: None)
    for step in range(5):
        fence.on(report_step(step))
    fence.close()
    assert len([entry for entry in tracker.received if entry != "closed"]) == received


def test_a_tracker_that_fails_is_named_once_in_one_line() -> None:
    reported: list[str] = []
    fence = Fence("W&B", lambda: Recorder(100), reported.append)
    for step in range(10):
        fence.on(report_step(step))
    fence.close()
    assert reported == ["W&B: turned off after an error (RuntimeError: no). The run folder is complete."]


def test_a_tracker_that_cannot_be_opened_is_named_once_in_one_line() -> None:
    reported: list[str] = []

    def fail() -> Recorder:
        raise ImportError("broken")

    send_everything(Fence("W&B", fail, reported.append))
    assert reported == ["W&B: turned off after an error (ImportError: broken). The run folder is complete."]


def test_a_blocked_tracker_delays_neither_a_report_nor_the_end() -> None:
    never, reported = threading.Event(), list[str]()

    def block() -> Recorder:
        never.wait()
        return Recorder()

    start = time.monotonic()
    fence = Fence("W&B", block, reported.append, capacity=3, close_seconds=0.2)
    for step in range(1000):
        fence.on(report_step(step))
    seconds = time.monotonic() - start
    fence.close()
    assert seconds < 0.2 and time.monotonic() - start < 2
    assert reported == ["W&B: abandoned, it did not finish within 0.2 s. The run folder is complete."]
    never.set()


def test_messages_dropped_by_a_full_queue_are_counted() -> None:
    go, tracker, reported = threading.Event(), Recorder(), list[str]()

    def wait() -> Recorder:
        go.wait()
        return tracker

    fence = Fence("W&B", wait, reported.append, capacity=3)
    for step in range(10):
        fence.on(report_step(step))
    go.set()
    fence.close()
    assert tracker.received == [*map(report_step, range(3)), "closed"]
    assert reported == ["W&B: 7 messages dropped, its queue was full. The run folder is complete."]


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
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert escape_controls(text) == shown


def test_line_breaks_are_escaped_if_one_line_is_wanted() -> None:
    assert escape_controls("a\nb", keep_newlines=False) == "a\\nb"


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_a_control_character(text: str) -> None:
    """G6: no control character is left, and the rest is unchanged."""
    shown = escape_controls(text, keep_newlines=False)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    shown.encode("utf-8")
    assert escape_controls(shown, keep_newlines=False) == shown
