"""Time: the limit of a run, the throughput of its steps."""

import contextlib
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

from smollm2.errors import (
    ResourceError,
)
from smollm2.plan.throughput import Duration, describe_correction, record_throughput
from smollm2.runtime.throughput import machine_of
from smollm2.training.progress import Progress
from smollm2.training.setup import Run
from smollm2.training.step import (
    StepResult,
)

CHECKED_STEPS = 20
"""Steps after which the announced time is compared with the measured one."""


@dataclass
class Clock:
    """Whether another step, with its duties and its save, still fits into the time limit."""

    limit: float | None
    started: float = field(default_factory=time.monotonic)
    step_began: float = 0.0
    longest: float = 0.0

    def begin_step(self) -> None:
        """A step, its duties and its save begin; how long the longest of the run took is remembered."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.step_began if self.step_began else 0.0)
        self.step_began = now

    def is_up(self, save_seconds: float) -> bool:
        """Whether the next step might end too late. Asked at the end of a step, before its save."""
        now = time.monotonic()
        return self.limit is not None and now - self.started + max(
            self.longest, now - self.step_began
        ) + save_seconds > (self.limit)


@dataclass
class Meter:
    """Tokens and seconds of the updates since the last report; evaluation, samples and saves are outside."""

    tokens: int = 0
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def add(self, result: StepResult) -> None:
        """One update more."""
        self.recent.append(result.seconds)
        self.tokens += result.tokens
        self.seconds += result.seconds

    def take(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return rate


def save_throughput(run: Run, meter: Meter) -> None:
    """Record in the cache folder how long a step took, for later estimates. A failure never ends a run."""
    if run.runtime.rank == 0 and len(meter.recent) >= 3:
        seconds = statistics.median(list(meter.recent)[1:])
        with contextlib.suppress(OSError, ResourceError):
            record_throughput(run.config, machine_of(run.runtime), seconds)


def correct_time(run: Run, progress: Progress, meter: Meter, announced: Duration) -> None:
    """Report the corrected time once, after some steps, if the announced one was far from it."""
    if len(meter.recent) == CHECKED_STEPS:
        left = run.config.training.train_steps - progress.step
        message = describe_correction(announced, list(meter.recent), left)
        if message:
            run.tracker.log_event("estimate", message, progress.step)
