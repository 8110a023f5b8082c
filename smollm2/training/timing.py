"""The time limit of a run, how a run ends before its last step, and the throughput of its steps."""

import contextlib
import signal
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from smollm2.errors import Interrupted, ResourceError
from smollm2.plan.throughput import Duration, correct_duration, describe_correction, record_throughput
from smollm2.runtime.device import Runtime
from smollm2.runtime.throughput import machine_of
from smollm2.training.setup import Run
from smollm2.training.step import StepResult

CHECKED_STEPS = 20
"""The minimum number of steps to measure before the announced time is compared with them."""

CHECKED_SECONDS = 20.0
"""The minimum duration of the measured steps before the announced time can be corrected upwards; it doubles after each
comparison."""

SLOW, SLOW_SECONDS, SLOW_REPORTS = 1.5, 0.02, 3
"""A rank is slow if it needs this many times the median of the ranks, and this many seconds more, in this many reports."""

TIME_UP = 1000
"""A pseudo signal number: the run has reached its own time limit."""


@dataclass
class TimeLimit:
    """The time limit of a run: tells whether another step, with its evaluation, samples and save, fits within it."""

    seconds: float | None
    started: float = field(default_factory=time.monotonic)
    step_began: float = 0.0
    longest_step: float = 0.0

    def begin_step(self) -> None:
        """Mark the start of a step, and update `longest_step`, which includes a step's actions and its save."""
        now = time.monotonic()
        if self.step_began:
            self.longest_step = max(self.longest_step, now - self.step_began)
        self.step_began = now

    def is_up(self, save_seconds: float) -> bool:
        """Return whether the next step might end too late. Call this at the end of a step, before its save."""
        if self.seconds is None:
            return False
        now = time.monotonic()
        next_step = max(self.longest_step, now - self.step_began)
        return now - self.started + next_step + save_seconds > self.seconds


@dataclass
class Meter:
    """Counts tokens and seconds of the steps since the last report, without evaluation, samples and saves."""

    tokens: int = 0
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    own: list[float] = field(default_factory=list)

    def add(self, result: StepResult, own_seconds: float) -> None:
        """Count one step, and the seconds of it in which this rank did not wait for others."""
        self.own.append(own_seconds)
        self.recent.append(result.seconds)
        self.tokens += result.tokens
        self.seconds += result.seconds

    def take_tokens_per_second(self) -> float:
        """Return the tokens per second since the last call, and start counting again."""
        rate = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return rate


def own_seconds(runtime: Runtime) -> float:
    """Return a clock that stands still while this rank waits for others.

    If the model is shared out, every pass waits many times: then it is the processor's time, which does not see a GPU.
    """
    if runtime.layout.is_sharded:
        return time.process_time() / torch.get_num_threads()
    return time.monotonic() - runtime.pulse.waited


@dataclass
class Stragglers:
    """Compares the ranks' own time per step at each report, and names a rank that is slow in several reports in a row."""

    slow: int = -1
    reports: int = 0
    named: set[int] = field(default_factory=set)

    def compare(self, run: Run, meter: Meter) -> dict[str, float]:
        """Return the lowest, the median and the highest seconds of the ranks; nothing if there is one. A collective."""
        mine, meter.own = statistics.median(meter.own), []
        if run.runtime.world_size == 1:
            return {}
        seconds = run.runtime.gather(mine)
        usual, highest = statistics.median_low(seconds), max(seconds)
        slow = seconds.index(highest) if highest > SLOW * usual and highest - usual > SLOW_SECONDS else -1
        self.reports = self.reports + 1 if slow == self.slow else 1
        self.slow = slow
        if slow >= 0 and self.reports == SLOW_REPORTS and slow not in self.named:
            self.named.add(slow)
            message = f"rank {slow} is slow: it works {highest:.3g} s in a step, most ranks {usual:.3g} s, and they wait for it"
            run.tracker.log_event("straggler", message, run.runtime.pulse.step)
        return {"rank_seconds_min": min(seconds), "rank_seconds_median": usual, "rank_seconds_max": highest}


def save_throughput(run: Run, meter: Meter) -> None:
    """Record the median time per step in the cache folder, for later estimates. A failure never ends a run."""
    if run.runtime.rank == 0 and len(meter.recent) >= 3:
        seconds = statistics.median(list(meter.recent)[1:])
        with contextlib.suppress(OSError, ResourceError):
            record_throughput(run.config, machine_of(run.runtime), seconds)


@dataclass
class Forecast:
    """The announced duration of a run, compared with measured steps during the run and corrected if it is far off.

    It is corrected upwards only after steps have been slow for a while: another program that runs for a few seconds
    does not make the machine slow. If that program runs for longer, a second correction follows after it has ended.
    """

    announced: Duration
    needed: float = CHECKED_SECONDS
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)

    def add(self, seconds: float, steps_left: int) -> str | None:
        """Count one step. Return a message that corrects the announced time if a correction is due, else None."""
        self.steps.append(seconds)
        self.seconds += seconds
        is_long = len(self.steps) >= CHECKED_STEPS and self.seconds >= self.needed
        if not is_long and len(self.steps) != CHECKED_STEPS:
            return None
        corrected = correct_duration(self.announced, self.steps, steps_left)
        message = None
        if corrected and (is_long or corrected.step < self.announced.step):
            message = describe_correction(self.announced, corrected, steps_left)
            self.announced = corrected
        if is_long:
            self.steps, self.seconds, self.needed = [], 0.0, 2 * self.needed
        return message


def stopped(number: int, step: int) -> Interrupted:
    """Return the error for a run that ended after a saved step, because of a signal or TIME_UP."""
    if number == TIME_UP:
        return Interrupted(f"training.time_limit was reached; step {step} is saved", 0)
    return Interrupted(f"stopped by {signal_name(number)}; step {step} is saved", number)


def signal_name(number: int) -> str:
    """Return the name by which users know the signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
