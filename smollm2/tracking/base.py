"""What a tracker is, how one report reaches several, and the fence behind which the unreliable ones stand.

A fenced tracker lives on its own daemon thread and hears of things through a bounded queue, so that a server that hangs
costs the run nothing: what the queue cannot hold is dropped and counted, and the local files have it all.
"""

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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


@dataclass(frozen=True)
class Histogram:
    """How often a number fell between `edges[i]` and `edges[i + 1]`: one count fewer than edges."""

    counts: Sequence[int]
    edges: Sequence[float]


@dataclass(frozen=True)
class Diagnosis:
    """One look inside the model, at one update.

    By parameter: the norms of its gradient (before clipping) and of its weights, and how far the update moved it over that
    weight norm. By block: its activations (`rms`, `max_abs`, `max_attention_logit`, `dead_units`: a share). `clipped` is the
    share of updates since the last look whose gradient was clipped. The histograms are for mirrors that draw them.
    """

    gradient_norms: Mapping[str, float]
    weight_norms: Mapping[str, float]
    update_ratios: Mapping[str, float]
    activations: Mapping[str, Mapping[str, float]]
    clipped: float
    gradient_histograms: Mapping[str, Histogram] = field(default_factory=dict)
    weight_histograms: Mapping[str, Histogram] = field(default_factory=dict)


@dataclass(frozen=True)
class Landscape:
    """The loss around the weights of one step, along two random filter-normalized directions (Li et al. 2018).

    `loss` is that of the weights themselves. `line[i]` is the loss at `line_at[i]` along the first direction; `grid[i][j]`
    that at `grid_at[i]` along the first and `grid_at[j]` along the second. Drawn from `seed`, measured on `targets` tokens.
    """

    loss: float
    line_at: Sequence[float]
    line: Sequence[float]
    grid_at: Sequence[float]
    grid: Sequence[Sequence[float]]
    seed: int
    targets: int


class Tracker(Protocol):
    """Hears of a run, and does nothing about what it does not override. `step` is the number of updates done."""

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Numbers: one report, or one validation."""
        return

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """One round of samples."""
        return

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """Something that happened once: a resume, a skipped step, a checkpoint; `details` are plain JSON values."""
        return

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """One look inside the model."""
        return

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        """The loss around the weights."""
        return

    def save_file(self, path: Path, step: int, *, is_best: bool) -> None:
        """A checkpoint that was written and verified; `is_best` by its validation loss. It may be removed after the call."""
        return

    def close(self) -> None:
        """The run is over."""
        return


class Fanout(Tracker):
    """Passes everything on to several trackers, in order, and counts the seconds that the run spends on them."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)
        self.seconds_in_line = 0.0

    @property
    def seconds(self) -> float:
        """What watching took so far: what the run waited for, and what fenced trackers computed beside it."""
        return self.seconds_in_line + sum(tracker.seconds for tracker in self.trackers if isinstance(tracker, Fence))

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.log(metrics, step))

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.log_text(samples, step))

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.log_event(kind, message, step, **details))

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.log_diagnosis(diagnosis, step))

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.log_landscape(landscape, step))

    def save_file(self, path: Path, step: int, *, is_best: bool) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.save_file(path, step, is_best=is_best))

    def close(self) -> None:
        """To each tracker."""
        self._tell(lambda tracker: tracker.close())

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the block takes among the seconds spent on watching the run."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_in_line += time.perf_counter() - began

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        with self.counted():
            for tracker in self.trackers:
                call(tracker)


KeepFile = Callable[[Path, bool], Path | None]
"""Of a saved file and whether it is the best: what stands in for it until a thread gets to it; None: it is not wanted."""


def keep_as_it_is(path: Path, is_best: bool) -> Path:
    """For trackers that need no more than the name."""
    return path


class Fence(Tracker):
    """A tracker that cannot hurt: opened, called and closed on a thread of its own, off after three failures."""

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        say: Say,
        *,
        keep_file: KeepFile = keep_as_it_is,
        leave: Callable[[], None] = lambda: None,
        capacity: int = QUEUE_CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """`keep_file` is asked in-line for each file that is saved: it may be removed before the thread hears of it.
        `leave` is called where the thread did not finish within `close_seconds`."""
        self.name = name
        self.seconds = 0.0  # of this thread's computing; of the interpreter's lock the run has as little as of a core
        self.keep_file, self.leave = keep_file, leave
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

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """Queue it; never waits."""
        self._queue(lambda tracker: tracker.log_diagnosis(diagnosis, step))

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        """Queue it; never waits."""
        self._queue(lambda tracker: tracker.log_landscape(landscape, step))

    def save_file(self, path: Path, step: int, *, is_best: bool) -> None:
        """Queue what `keep_file` makes of it; never waits."""
        kept = None if self.is_off else self.keep_file(path, is_best)
        if kept is not None:
            self._queue(lambda tracker: tracker.save_file(kept, step, is_best=is_best))

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
            self.leave()
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
        self.seconds = time.thread_time()
        while (call := self.calls.get()) is not None:
            if tracker is None or self.is_off:
                continue
            try:
                call(tracker)
            except BaseException as error:
                failures += 1
                if failures == FAILURES_ALLOWED:
                    self._turn_off(error)
            self.seconds = time.thread_time()
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
