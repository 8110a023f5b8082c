"""The verdict of an autopsy: data, precision, learning rate or a transient fault, weighed by what the reruns found."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from smollm2.training.progress import spike_limit

NOT_FINITE = "not finite"
TRANSIENT, PRECISION, RATE, WEIGHTS, DATA, UNKNOWN = "transient", "precision", "rate", "weights", "data", "unknown"

JUMP = 1.5
"""A learning rate that is this many times the one before has jumped; a warmup of 128 steps or more never does so."""

RECENT = 16
"""Steps before a spike in which a jump of the rate can have caused it."""

ROUNDING = 0.01
"""The relative difference up to which two runs of a step differ by rounding, if the device's kernels add in a varying order."""


@dataclass(frozen=True)
class Numbers:
    """The loss and the gradient norm of a batch."""

    loss: float
    grad_norm: float

    def equals(self, other: "Numbers", *, is_exact: bool) -> bool:
        """Return whether the numbers are the same: bit by bit, or up to rounding. NaN equals NaN."""
        pairs = ((self.loss, other.loss), (self.grad_norm, other.grad_norm))
        if all(a.hex() == b.hex() for a, b in pairs):
            return True
        return not is_exact and all(math.isclose(a, b, rel_tol=ROUNDING) or a.hex() == b.hex() for a, b in pairs)


@dataclass(frozen=True)
class Evidence:
    """What is known about a step: its numbers as recorded, of the rerun and in float32 (None if it runs in float32).

    `before` are the numbers of the batch before on the same weights, None at step 1. `losses`, `norms` and `rates` are
    those of the last steps. `on_checkpoint` is the loss of the batch on the weights of the checkpoint `checkpoint`.
    """

    step: int
    problem: str
    recorded: Numbers
    again: Numbers
    float32: Numbers | None
    before: Numbers | None
    losses: Sequence[float]
    norms: Sequence[float]
    rates: Sequence[float]
    precision: str
    is_transient: bool
    cause: str = UNKNOWN
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of the number that is unusual."""
        return self.problem if self.problem != NOT_FINITE else "loss"

    @property
    def usual(self) -> Sequence[float]:
        """The numbers of the last steps that the unusual one is compared with."""
        return self.norms if self.problem == "gradient norm" else self.losses

    def pick(self, numbers: Numbers) -> float:
        """Return the number that is unusual in this step, of another batch or rerun."""
        if self.problem == NOT_FINITE and not math.isfinite(numbers.grad_norm):
            return numbers.grad_norm
        return numbers.grad_norm if self.problem == "gradient norm" else numbers.loss

    def is_bad(self, numbers: Numbers) -> bool:
        """Return whether these numbers share the problem of the step: more than half of what it is above the mean."""
        value, found = self.pick(numbers), self.pick(self.recorded)
        if self.problem == NOT_FINITE or not math.isfinite(value):
            return not math.isfinite(value)
        mean = statistics.fmean(self.usual)
        return value - mean > (found - mean) / 2


def find_jump(rates: Sequence[float], step: int) -> tuple[int, float, float] | None:
    """Return the step of the last jump of the rate among the last updates, the rate before and the rate after."""
    recent = list(rates[-RECENT - 1 :])
    first = step - len(recent)
    jumps = [(first + i, old, new) for i, (old, new) in enumerate(pairwise(recent), 1) if old and new > JUMP * old]
    return jumps[-1] if jumps else None


def weigh(evidence: Evidence) -> Evidence:
    """Return the evidence with its cause, and the reason as a phrase."""
    e, name = evidence, evidence.name
    jump = find_jump(e.rates, e.step)
    if e.is_transient:
        return conclude(
            e,
            TRANSIENT,
            f"a rerun of the step gives loss {e.again.loss:.6g}, gradient norm {e.again.grad_norm:.6g}: the numbers were "
            "wrong only once, so the memory or the device made an error",
        )
    if e.float32 and not e.is_bad(e.float32):
        return conclude(e, PRECISION, f"in float32 the same batch has a {name} of {e.pick(e.float32):.6g}")
    if e.before is None:
        return conclude(e, UNKNOWN, "there is no batch before it to compare with")
    now = f"the batch before has a {name} of {e.pick(e.before):.6g} on the same weights"
    if not e.is_bad(e.before):
        return conclude(e, DATA, f"{now}, this batch {e.pick(e.recorded):.6g}")
    now += f", and {e.usual[-1]:.6g} when it was trained on" if e.usual else ""
    if jump:
        return conclude(e, RATE, f"it rose from {jump[1]:.3g} to {jump[2]:.3g} at step {jump[0]}, and {now}")
    return conclude(e, WEIGHTS, f"{now}: the learning rate is too high for them, or a fault changed them")


def conclude(e: Evidence, cause: str, reason: str) -> Evidence:
    """Return the evidence with this cause and reason."""
    return dataclasses.replace(e, cause=cause, reason=reason)


CAUSES = {
    TRANSIENT: "a transient fault",
    PRECISION: "the precision",
    RATE: "the learning rate",
    WEIGHTS: "the weights",
    DATA: "the data",
    UNKNOWN: "not known",
}


def describe_verdict(e: Evidence) -> str:
    """Return the sentences that weigh the causes against each other."""
    limit = f" (limit {spike_limit(e.usual):.6g})" if e.problem != NOT_FINITE and e.usual else ""
    text = (
        f"step {e.step}: loss {e.recorded.loss:.6g}, gradient norm {e.recorded.grad_norm:.6g}: "
        f"{'not finite' if e.problem == NOT_FINITE else f'the {e.problem} is a spike{limit}'}. "
        f"The cause is {CAUSES[e.cause]}: {e.reason}"
    )
    if e.cause == TRANSIENT:
        return text
    others = ["a rerun gives the same numbers"]
    if e.float32 and e.cause != PRECISION:
        others.append(f"in float32 the {e.name} is {e.pick(e.float32):.6g}")
    elif not e.float32:
        why = "" if e.precision == "float32" else ", and a model that is shared out is not rerun in float32"
        others.append(f"the precision is {e.precision}{why}")
    if e.cause != RATE and e.rates:
        jump = find_jump(e.rates, e.step)
        others.append(f"the learning rate {'rose' if jump else 'did not jump'} ({e.rates[-1]:.3g})")
    return f"{text}. Of the others: {', '.join(others)}"
