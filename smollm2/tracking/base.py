"""The tracker interface, its messages, the fan-out to several trackers, and `Fence`, which isolates unreliable ones.

Everything that a run records is a `Message`. A `Fence` runs a tracker on a daemon thread, which receives messages
through a bounded queue. A server that hangs therefore does not slow down the run: messages that do not fit into the
queue are dropped and counted, while the local files stay complete.
"""

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

FAILURES_ALLOWED = 3
CLOSE_SECONDS = 30.0
QUEUE_CAPACITY = 10_000

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal interprets instead of showing: C0, DEL and C1, marks that reorder text, line separators;
and lone surrogates, which cannot be encoded."""

Report = Callable[[str], None]
"""A function that shows one message to the user."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of one step, either from training or from a validation."""

    values: Mapping[str, float | int]


@dataclass(frozen=True)
class Sample:
    """The text that the model generated for a prompt; `text` does not include the prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Samples:
    """The samples generated after one step."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Event:
    """Something that happened once: a resume, a skipped step, a checkpoint. `details` has plain JSON values."""

    kind: str
    text: str
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """A histogram: `counts[i]` values are between `edges[i]` and `edges[i + 1]`; there is one more edge than counts."""

    counts: Sequence[int]
    edges: Sequence[float]


@dataclass(frozen=True)
class Diagnosis:
    """The diagnostics of the model at one step.

    For each parameter: the norm of its gradient before clipping, the norm of its weights, and the norm of its update
    divided by the norm of its weights. For each block: statistics of its activations (`rms`, `max_abs`,
    `max_attention_logit`, and `dead_units`, a fraction). `clipped` is the fraction of steps since the last diagnostics
    whose gradient was clipped. The histograms are only for trackers that can draw them.
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

    `loss` is the loss at the weights themselves. `line[i]` is the loss at distance `line_at[i]` along the first
    direction; `grid[i][j]` is the loss at `grid_at[i]` along the first direction and `grid_at[j]` along the second. The
    directions are drawn with the random seed `seed`; each loss is measured on `targets` tokens.
    """

    loss: float
    line_at: Sequence[float]
    line: Sequence[float]
    grid_at: Sequence[float]
    grid: Sequence[Sequence[float]]
    seed: int
    targets: int


@dataclass(frozen=True)
class SavedFile:
    """A checkpoint that was written and verified; `is_best` tells whether its validation loss is the lowest so far.

    The file may be removed after the tracker's `on` has returned.
    """

    path: Path
    is_best: bool


@dataclass(frozen=True)
class Message:
    """One record of a run. `step` is the number of completed optimizer steps."""

    step: int
    content: Metrics | Samples | Event | Diagnosis | Landscape | SavedFile


class Tracker(Protocol):
    """Receives the messages of a run and ignores the kinds that it does not use."""

    def on(self, message: Message) -> None:
        """Record one message."""

    def close(self) -> None:
        """Finish recording: no message follows."""


class Fanout(Tracker):
    """Passes each message to several trackers in order, and measures the time that the run spends on them."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)
        self.seconds_in_line = 0.0

    @property
    def seconds(self) -> float:
        """The tracking overhead so far in seconds: the time the run waited plus the CPU time of the `Fence` threads."""
        return self.seconds_in_line + sum(tracker.seconds for tracker in self.trackers if isinstance(tracker, Fence))

    def on(self, message: Message) -> None:
        """Pass the message to each tracker."""
        with self.counted():
            for tracker in self.trackers:
                tracker.on(message)

    def close(self) -> None:
        """Close each tracker."""
        with self.counted():
            for tracker in self.trackers:
                tracker.close()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time of the `with` block as tracking overhead."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_in_line += time.perf_counter() - began

    # One method per kind of message keeps the training loop readable.

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Record the metrics of a training step or a validation."""
        self.on(Message(step, Metrics(metrics)))

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """Record the samples generated after one step."""
        self.on(Message(step, Samples(samples)))

    def log_event(self, kind: str, text: str, step: int, **details: object) -> None:
        """Record an event; `text` is shown to the user unless it is empty."""
        self.on(Message(step, Event(kind, text, details)))

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """Record the diagnostics of one step."""
        self.on(Message(step, diagnosis))

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        """Record the loss landscape around the weights of one step."""
        self.on(Message(step, landscape))

    def save_file(self, path: Path, step: int, *, is_best: bool) -> None:
        """Record a checkpoint that was written and verified."""
        self.on(Message(step, SavedFile(path, is_best)))


KeepFile = Callable[[Path, bool], Path | None]
"""A function that takes the path of a saved file and whether it is the best. It returns the path that the tracker's
thread will use later, or None to skip the file."""


def keep_path(path: Path, is_best: bool) -> Path:
    """Return the path unchanged, for trackers that need only the file's name."""
    return path


class Fence(Tracker):
    """Runs a tracker on its own thread, so that it can neither delay nor end the run. Three failures turn it off."""

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        report: Report,
        *,
        keep_file: KeepFile = keep_path,
        abandon: Callable[[], None] = lambda: None,
        capacity: int = QUEUE_CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """`keep_file` is called synchronously for each saved file, because the file may be removed before the thread
        uses it. `abandon` is called if the thread does not finish within `close_seconds`."""
        self.name = name
        self.seconds = 0.0  # CPU time of this thread, which competes with the run for the GIL
        self.keep_file, self.abandon = keep_file, abandon
        self.report = report
        self.close_seconds = close_seconds
        self.dropped = 0
        self.is_off = False
        self.messages: queue.Queue[Message | None] = queue.Queue(capacity)
        self.thread = threading.Thread(target=self._work, args=(open_tracker,), name=name, daemon=True)
        self.thread.start()

    def on(self, message: Message) -> None:
        """Queue the message without waiting."""
        if self.is_off:
            return
        content = message.content
        if isinstance(content, Metrics):
            content = Metrics(dict(content.values))  # the caller may reuse its dictionary
        elif isinstance(content, SavedFile):
            kept = self.keep_file(content.path, content.is_best)
            if kept is None:
                return
            content = SavedFile(kept, content.is_best)
        try:
            self.messages.put_nowait(replace(message, content=content))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait up to `close_seconds` for the thread to finish; report if it did not, or if messages were dropped."""
        deadline = time.monotonic() + self.close_seconds
        try:
            self.messages.put(None, timeout=self.close_seconds)
            self.thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self.is_off:
            return
        if self.thread.is_alive():
            self.is_off = True
            self.report(
                f"{self.name}: abandoned, it did not finish within {self.close_seconds:g} s. The run folder is complete."
            )
            self.abandon()
        elif self.dropped:
            self.report(
                f"{self.name}: {self.dropped} messages dropped, its queue was full. The run folder is complete."
            )

    def _work(self, open_tracker: Callable[[], Tracker]) -> None:
        """Pass the queued messages to the tracker, on the thread.

        This is the only code in the project that catches every exception, because none may reach the run.
        """
        failures = 0
        tracker = None
        try:
            tracker = open_tracker()
        except BaseException as error:
            self._turn_off(error)
        self.seconds = time.thread_time()
        while (message := self.messages.get()) is not None:
            if tracker is None or self.is_off:
                continue
            try:
                tracker.on(message)
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
        if not self.is_off:
            self.is_off = True
            self.report(f"{self.name}: turned off after an error ({describe(error)}). The run folder is complete.")


def describe(error: BaseException) -> str:
    """Return a third-party library's error as one line: its type and the start of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def escape_controls(text: str, *, keep_newlines: bool = True) -> str:
    """Return the text with every control character made visible: ESC becomes the four characters `\\x1b`."""

    def show(match: re.Match[str]) -> str:
        character = match[0]
        return character if character == "\n" and keep_newlines else character.encode("unicode_escape").decode("ascii")

    return CONTROLS.sub(show, text)
