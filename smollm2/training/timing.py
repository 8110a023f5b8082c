"""Time: the limit of a run, how a run ends before its last step, and the throughput of its steps."""

import contextlib
import signal
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

from smollm2.errors import Interrupted, ResourceError
from smollm2.plan.throughput import Duration, describe_correction, record_throughput
from smollm2.runtime.throughput import machine_of
from smollm2.training.setup import Run
from smollm2.training.step import StepResult

CHECKED_STEPS = 20
"""Steps after which the announced time is compared with the measured one."""

TIME_UP = 1000
"""A pseudo signal number: the run has reached its own time limit."""


@dataclass
class TimeLimit:
    """Whether another step, with its actions and its save, still fits into training.time_limit."""

    seconds: float | None
    started: float = field(default_factory=time.monotonic)
    step_began: float = 0.0
    longest_step: float = 0.0

    def begin_step(self) -> None:
        """Record how long the run's longest step took, with its actions and its save."""
        now = time.monotonic()
        if self.step_began:
            self.longest_step = max(self.longest_step, now - self.step_began)
        self.step_began = now

    def is_up(self, save_seconds: float) -> bool:
        """Return whether the next step might end too late. Called at the end of a step, before its save."""
        if self.seconds is None:
            return False
        now = time.monotonic()
        next_step = max(self.longest_step, now - self.step_began)
        return now - self.started + next_step + save_seconds > self.seconds


@dataclass
class Meter:
    """Tokens and seconds of the steps since the last report; evaluation, samples and saves do not count."""

    tokens: int = 0
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.recent.append(result.seconds)
        self.tokens += result.tokens
        self.seconds += result.seconds

    def take_tokens_per_second(self) -> float:
        """Return the tokens per second since the last call."""
        rate = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return rate


def save_throughput(run: Run, meter: Meter) -> None:
    """Record in the cache folder how long a step took, for later estimates. A failure never ends a run."""
    if run.runtime.rank == 0 and len(meter.recent) >= 3:
        seconds = statistics.median(list(meter.recent)[1:])
        with contextlib.suppress(OSError, ResourceError):
            record_throughput(run.config, machine_of(run.runtime), seconds)


def correct_time(run: Run, step: int, meter: Meter, announced: Duration) -> None:
    """Report the corrected time once, after some steps, if the announced one was far off."""
    if len(meter.recent) == CHECKED_STEPS:
        message = describe_correction(announced, list(meter.recent), run.config.training.train_steps - step)
        if message:
            run.tracker.log_event("estimate", message, step)


def stopped(number: int, step: int) -> Interrupted:
    """Return the error for a run that a signal or TIME_UP ended after a saved step."""
    if number == TIME_UP:
        return Interrupted(f"training.time_limit is reached; step {step} is saved", 0)
    return Interrupted(f"stopped by {signal_name(number)}; step {step} is saved", number)


def signal_name(number: int) -> str:
    """Return the name by which users know the signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
