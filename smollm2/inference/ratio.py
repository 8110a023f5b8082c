"""A ratio of two sums over the parts of a text, with its confidence interval."""

import math
from dataclasses import dataclass


@dataclass
class Ratio:
    """The ratio sum(a) / sum(b) over the parts of a text, with its uncertainty. Only running sums are stored."""

    parts: int = 0
    a: float = 0.0
    b: float = 0.0
    aa: float = 0.0
    ab: float = 0.0
    bb: float = 0.0

    def add(self, a: float, b: float) -> None:
        """Add the a and b of one part."""
        self.parts += 1
        self.a, self.b = self.a + a, self.b + b
        self.aa, self.ab, self.bb = self.aa + a * a, self.ab + a * b, self.bb + b * b

    @property
    def value(self) -> float:
        """The ratio, or NaN if the sum of b is 0."""
        return self.a / self.b if self.b else math.nan

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the ratio, assuming independent parts; None for fewer than two parts."""
        if self.parts < 2 or not self.b:
            return None
        squares = max(0.0, self.aa - 2 * self.value * self.ab + self.value**2 * self.bb)
        error = math.sqrt(squares * self.parts / (self.parts - 1)) / self.b
        return self.value - 1.96 * error, self.value + 1.96 * error
