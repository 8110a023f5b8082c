"""The training loop's state between steps: `Progress`, which is saved as a whole in each checkpoint."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smollm2.training.step import StepResult

MAX_SKIPS_IN_A_ROW = 10
MAX_SKIPS_IN_1000 = 10
MAX_OVERFLOWS_IN_A_ROW = 20
SPIKE_WINDOW = 128
SPIKE_SIGMAS = 6

TOP_LEVEL = ("step", "tokens", "loss")
"""The fields that are stored at the top level of a checkpoint; the others are stored under `stability`."""


@dataclass(frozen=True)
class Progress:
    """The complete state of the training loop. A new field needs a default, because older checkpoints do not have it.

    `loss` is the loss of the last step; `losses`, `norms` and `rates` are the loss, gradient norm and learning rate of
    the last 128 steps that were not skipped. `skipped` are the steps without an update, `spikes` the steps with a spike,
    `pending` the actions of this step that are still to be run. `clipped` has two counts of the steps since the last
    diagnostics: those whose gradient was clipped, and all. `skips` are pairs (a step, how many batches are left out
    after it), one after the other: see `Batches.skipping`.
    """

    step: int = 0
    tokens: int = 0
    loss: float = math.nan
    best_validation_loss: float = math.inf
    skipped: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    spikes: tuple[int, ...] = ()
    pending: tuple[str, ...] = ()
    clipped: tuple[int, int] = (0, 0)
    norms: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    skips: tuple[int, ...] = ()

    def after(self, result: StepResult) -> "Progress":
        """Return the progress after one more step; a skipped step counts too."""
        step, before, last = self.step + 1, self, slice(-SPIKE_WINDOW, None)
        if not result.skipped:  # one NaN would spoil the statistics for 128 steps
            losses, norms = (*self.losses, result.loss)[last], (*self.norms, result.grad_norm)[last]
            rates = (*self.rates, result.learning_rate)[last]
            before = dataclasses.replace(self, losses=losses, norms=norms, rates=rates)
        return dataclasses.replace(
            before,
            step=step,
            tokens=self.tokens + result.tokens,
            loss=result.loss,
            skipped=(*self.skipped, step) if result.skipped else self.skipped,
            spikes=(*self.spikes, step) if result.spike else self.spikes,
            pending=(),
            clipped=(self.clipped[0] + int(result.clipped), self.clipped[1] + 1),
        )

    def find_spike(self, loss: float, grad_norm: float) -> str:
        """Return which number of the next step is a spike, "loss" or "gradient norm", or "" if neither is."""
        if is_spike(self.losses, loss):
            return "loss"
        return "gradient norm" if is_spike(self.norms, grad_norm) else ""

    def to_state(self) -> dict[str, Any]:
        """Return the checkpoint entries that `from_state` reads: plain values, with tuples as lists."""
        kept = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {**{name: kept.pop(name) for name in TOP_LEVEL}, "stability": kept}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Progress":
        """Return the progress stored in a checkpoint. A field that the checkpoint does not have gets its default."""
        names = {field.name for field in dataclasses.fields(cls)}
        found = {name: v for name, v in state["stability"].items() if name in names}
        found |= {name: state[name] for name in TOP_LEVEL}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        return cls(**values)


def is_spike(values: Sequence[float], value: float) -> bool:
    """Return whether `value` exceeds the mean of the last 128 finite values by more than 6 standard deviations."""
    return len(values) >= SPIKE_WINDOW and value > spike_limit(values)


def spike_limit(values: Sequence[float]) -> float:
    """Return the mean of the values plus 6 standard deviations."""
    mean = statistics.fmean(values)
    # Not statistics.pstdev, which computes with fractions: 10 times slower, and this runs in each step.
    return mean + SPIKE_SIGMAS * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def too_many_skips(skipped: Sequence[int], step: int, *, fp16: bool) -> str | None:
    """Return why a run that skipped these steps must stop after `step`, or None if it may continue.

    The limit is ten skipped steps in a row, or more than 1 % of the last 1,000. With fp16, which finds its loss scale
    through overflows, it is 20 in a row.
    """
    in_a_row = 0
    while in_a_row < len(skipped) and skipped[-1 - in_a_row] == step - in_a_row:
        in_a_row += 1
    if in_a_row >= (MAX_OVERFLOWS_IN_A_ROW if fp16 else MAX_SKIPS_IN_A_ROW):
        return f"{in_a_row} steps in a row had a loss or gradient that is not finite"
    recent = sum(s > step - 1000 for s in skipped)
    if not fp16 and recent > MAX_SKIPS_IN_1000:
        return f"{recent} of the last 1000 steps had a loss or gradient that is not finite"
    return None
