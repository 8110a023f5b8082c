"""What the loop remembers between two steps."""

import math
from dataclasses import dataclass

from smollm2.training.step import (
    SPIKE_WINDOW,
    StepResult,
    is_spike,
)


@dataclass(frozen=True)
class Progress:
    """All that the loop remembers.

    `loss` is that of the last update, `losses` the last 128 that were finite; `skipped` are the updates that were not,
    `spikes` those whose loss stood out, `pending` the duties of this step that are not done: validation, samples.
    `clipped` counts the updates since the last look inside the model whose gradient was clipped, and all of them.
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

    def after(self, result: StepResult) -> "Progress":
        """One update further; a skipped one counts."""
        step = self.step + 1
        skipped, losses, spikes = self.skipped, self.losses, self.spikes
        if result.skipped:
            skipped = (*skipped, step)
        else:  # what is not finite stays out of the statistics, which it would spoil for 128 steps
            spikes = (*spikes, step) if is_spike(losses, result.loss) else spikes
            losses = (*losses, result.loss)[-SPIKE_WINDOW:]
        tokens, clipped = self.tokens + result.tokens, (self.clipped[0] + result.clipped, self.clipped[1] + 1)
        return Progress(step, tokens, result.loss, self.best_validation_loss, skipped, losses, spikes, (), clipped)
