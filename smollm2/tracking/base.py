"""What a tracker is, how one report reaches several, and the fence behind which the unreliable ones stand.

A fenced tracker lives on its own daemon thread and hears of things through a bounded queue, so that a server that hangs
costs the run nothing: what the queue cannot hold is dropped and counted, and the local files have it all.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

FAILURES_ALLOWED = 3
CLOSE_SECONDS = 30.0
QUEUE_CAPACITY = 10_000

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it: C0, DEL and C1, marks that reorder text, line separators; and lone
surrogates, which cannot be written at all."""

Say = Callable[[str], None]
"""Puts one line before the user."""


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt; `text` is the continuation alone."""

    prompt: str
    text: str


class Tracker(Protocol):
    """Hears of a run. `step` is the number of updates done."""

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Numbers: one report, or one validation."""

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """One round of samples."""

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """Something that happened once: a resume, a skipped step, a checkpoint; `details` are plain JSON values."""

    def close(self) -> None:
        """The run is over."""


class Fanout:
    """Passes everything on to several trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """To each tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """To each tracker."""
        for tracker in self.trackers:
            tracker.log_text(samples, step)

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """To each tracker."""
        for tracker in self.trackers:
            tracker.log_event(kind, message, step, **details)

    def close(self) -> None:
        """To each tracker."""
        for tracker in self.trackers:
            tracker.close()


class Fence:
    """A tracker that cannot hurt: opened, called and closed on a thread of its own, off after three failures."""

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        say: Say,
        *,
        capacity: int = QUEUE_CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.name = name
        self.say = say
        self.close_seconds = close_seconds
        self.dropped = 0
        self.is_off = False
        self.calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(capacity)
        self.thread = threading.Thread(target=self._work, args=(open_tracker,), name=name, daemon=True)
        self.thread.start()

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Queue it; never waits."""
        copied = dict(metrics)
        self._queue(lambda tracker: tracker.log(copied, step))

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """Queue it; never waits."""
        copied = tuple(samples)
        self._queue(lambda tracker: tracker.log_text(copied, step))

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """Queue it; never waits."""
        self._queue(lambda tracker: tracker.log_event(kind, message, step, **details))

    def close(self) -> None:
        """Let the thread finish, for `close_seconds` at most, and say what it could not send."""
        deadline = time.monotonic() + self.close_seconds
        try:
            self.calls.put(None, timeout=self.close_seconds)
            self.thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self.is_off:
            return
        if self.thread.is_alive():
            self.is_off = True
            self.say(
                f"{self.name} - did not finish within {self.close_seconds:g} s - it is left behind; the run folder has every row"
            )
        elif self.dropped:
            self.say(f"{self.name} - {self.dropped} calls found its queue full - the run folder has every row")

    def _queue(self, call: Callable[[Tracker], None]) -> None:
        if self.is_off:
            return
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1

    def _work(self, open_tracker: Callable[[], Tracker]) -> None:
        """The thread: the one place of the project where every exception is caught, because none may reach the run."""
        failures = 0
        tracker = None
        try:
            tracker = open_tracker()
        except BaseException as error:
            self._turn_off(error)
        while (call := self.calls.get()) is not None:
            if tracker is None or self.is_off:
                continue
            try:
                call(tracker)
            except BaseException as error:
                failures += 1
                if failures == FAILURES_ALLOWED:
                    self._turn_off(error)
        if tracker is not None:
            try:
                tracker.close()
            except BaseException as error:
                self._turn_off(error)

    def _turn_off(self, error: BaseException) -> None:
        """Say it once."""
        if not self.is_off:
            self.is_off = True
            self.say(f"{self.name} - {describe(error)} - it is off from here; the run folder has every row")


def describe(error: BaseException) -> str:
    """An error of other people's code in one line: its type and the start of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def escape_controls(text: str, *, keep_newlines: bool = True) -> str:
    """The text with everything that a terminal would obey made visible: ESC becomes the four characters `\\x1b`."""

    def show(match: re.Match[str]) -> str:
        character = match[0]
        return character if character == "\n" and keep_newlines else character.encode("unicode_escape").decode("ascii")

    return CONTROLS.sub(show, text)
