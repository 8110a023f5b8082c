"""Which source each window of a run is drawn from: a function of the window's position in the run, in O(1).

Within a stage the sources take turns in a pattern that repeats. After any number of windows, each source has been drawn
less than one window more or less often than its weight says. The pattern is the schedule that P-fair scheduling gives
periodic tasks (Baruah, Cohen, Plaxton, Varvel 1996): the j-th turn of a source with weight w is due by position
ceil((j + 1) / w), is not taken before floor(j / w), and the earliest deadline goes first.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Turns:
    """The repeating pattern of one stage: `source` (period,) and `before` (period,), how often that source came earlier."""

    def __init__(self, units: Sequence[int]) -> None:
        common = math.gcd(*units)
        self.counts = np.array(units, np.int64) // common
        self.period = int(self.counts.sum())
        self.source, self.before = (np.zeros(self.period, np.int64) for _ in range(2))
        taken = np.zeros(len(units), np.int64)
        for position in range(self.period):
            due = -(-(taken + 1) * self.period // np.maximum(self.counts, 1))
            released = (self.counts > 0) & (taken * self.period // np.maximum(self.counts, 1) <= position)
            chosen = int(np.where(released, due, np.iinfo(np.int64).max).argmin())
            self.source[position], self.before[position] = chosen, taken[chosen]
            taken[chosen] += 1

    def draw(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return the source of each position of the stage, and how often it was drawn in the stage before that."""
        rounds, slots = np.divmod(positions, self.period)
        sources = self.source[slots]
        return sources, rounds * self.counts[sources] + self.before[slots]

    def count(self, positions: int) -> Ints:
        """Return how often each source is drawn in the first `positions` positions, (sources,)."""
        rounds, rest = divmod(positions, self.period)
        counts: Ints = rounds * self.counts + np.bincount(self.source[:rest], minlength=len(self.counts))
        return counts


class MixtureSchedule:
    """The sources of all windows of a run. Stage i has the weights `units[i]` and begins at position `starts[i]`."""

    def __init__(self, units: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        self.stages = [Turns(weights) for weights in units]
        self.starts = np.array(starts, np.int64)
        self.drawn = np.zeros((len(units), len(units[0])), np.int64)  # before each stage
        for i in range(1, len(units)):
            self.drawn[i] = self.drawn[i - 1] + self.stages[i - 1].count(starts[i] - starts[i - 1])

    def draw(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return the source of each position, and how often that source was drawn before it."""
        stages = np.searchsorted(self.starts, positions, side="right") - 1
        sources, ordinals = np.zeros_like(positions), np.zeros_like(positions)
        for stage in np.unique(stages):
            here = stages == stage
            chosen, before = self.stages[stage].draw(positions[here] - self.starts[stage])
            sources[here], ordinals[here] = chosen, self.drawn[stage][chosen] + before
        return sources, ordinals

    def count(self, positions: int) -> Ints:
        """Return how often each source is drawn in the first `positions` positions of the run, (sources,)."""
        stage = int(np.searchsorted(self.starts, positions, side="right")) - 1
        counts: Ints = self.drawn[stage] + self.stages[stage].count(positions - int(self.starts[stage]))
        return counts


ONE_SOURCE = MixtureSchedule([[1]], [0])
"""All windows from one source."""
