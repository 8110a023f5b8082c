"""Time: the limit of a run, the throughput of its steps."""

import contextlib
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from smollm2.errors import (
    ResourceError,
)
from smollm2.plan import arithmetic as plan
from smollm2.training.setup import Run
from smollm2.training.step import (
    StepResult,
)


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


def leave_pace(run: Run, meter: Meter) -> None:
    """Leave in the cache folder how long an update took, for `smollm2 plan`; a guess about speed never ends a run."""
    device, cores = plan.find_device()
    on_cpu = run.runtime.device.type == "cpu"
    is_whole = run.runtime.world_size == 1 and torch.get_num_threads() == cores
    is_known = on_cpu == device.startswith("cpu") and (is_whole or not on_cpu)
    if run.runtime.rank == 0 and is_known and len(meter.recent) >= 3:
        seconds = statistics.median(list(meter.recent)[1:]) * run.runtime.world_size
        with contextlib.suppress(OSError, ResourceError):
            plan.keep_pace(run.config, device, cores, seconds)
