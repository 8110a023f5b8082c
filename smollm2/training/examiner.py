"""Who decides about a step whose numbers are unusual: by default, a step that is not finite makes no update."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """What becomes of a step: the numbers to report, whether the update is made, and which number is a spike, if any."""

    loss: float
    grad_norm: float
    updates: bool = True
    spike: str = ""


class Examiner:
    """Sees the numbers of a step after the backward pass, before the update."""

    def is_usual(self, loss: float, grad_norm: float) -> bool:
        """Return whether the step needs no examination."""
        return math.isfinite(loss) and math.isfinite(grad_norm)

    def examine(self, loss: float, grad_norm: float) -> Decision:
        """Decide about a step that is unusual on some rank; all ranks call this. It may replace the gradients."""
        return Decision(loss, grad_norm, updates=False)


ONLY_FINITE = Examiner()
