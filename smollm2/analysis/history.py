"""What is known of a run while it trains: the records that the verdicts of `verdicts.py` are rules over."""

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smollm2.tracking.base import Diagnosis, Event, Message, Metrics, Samples
from smollm2.tracking.charts import BASELINES

TRAINING = ("loss", "learning_rate", "grad_norm")
"""The metrics of a reported training step that the rules read."""


MEAN = 5
"""The reports over which the training loss at a validation is averaged."""

KEPT = 500
"""The training reports that are kept: of a run that reports every step, more than a rule reads."""


@dataclass(frozen=True)
class Facts:
    """What the rules need to know of a run's settings and text; `text` is its size in words, such as `1.1 MB`."""

    warmup_steps: int = 0
    is_from_scratch: bool = True
    is_chat: bool = False
    is_mixed_in_stages: bool = False
    is_repetitive: bool = False  # most of the validation text occurs in the training text
    is_validated_elsewhere: bool = False  # on a text of its own, on which n-grams of the training text may be poor
    text: str = ""


@dataclass(frozen=True)
class TrainingReport:
    """One reported training step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    epoch: float


@dataclass(frozen=True)
class ValidationReport:
    """One validation, and the mean training loss of the last reports before it.

    `windows` is how many windows it was measured on: losses on others are not comparable.
    """

    step: int
    loss: float
    windows: float
    training_loss: float


@dataclass
class Lowest:
    """The lowest level that the training loss has had: the median of three reports in a row, ending at `step`."""

    step: int
    loss: float
    grad_norm: float


@dataclass
class History:
    """The records of a run up to now. It depends only on the messages, in order, so a resumed run rebuilds it from its files.

    Records with a number that is missing or not finite are left out, and so are training reports that no rule reads again.
    """

    facts: Facts
    baselines: Mapping[str, float] = field(default_factory=dict)
    first_loss: float = math.nan
    training: list[TrainingReport] = field(default_factory=list)
    validation: list[ValidationReport] = field(default_factory=list)
    samples: list[tuple[int, Sequence[str]]] = field(default_factory=list)
    diagnoses: list[tuple[int, Diagnosis]] = field(default_factory=list)
    lowest: Lowest | None = None

    @property
    def step(self) -> int:
        """The last reported training step; 0 before the first."""
        return self.training[-1].step if self.training else 0

    def add(self, message: Message) -> bool:
        """Add the records of a message; return whether there was one that the rules read."""
        match message.content:
            case Metrics(values):
                return self._add_metrics(message.step, values)
            case Samples(samples):
                self.samples = [*self.samples, (message.step, [sample.text for sample in samples])][-2:]
            case Diagnosis() as diagnosis:
                self.diagnoses = [*self.diagnoses, (message.step, diagnosis)][-2:]
            case Event("baselines", _, {"losses": Mapping() as losses}):
                self.baselines = {name: losses[name] for name in BASELINES}
            case _:
                return False
        return True

    def recent(self, steps: int, reports: int) -> list[TrainingReport]:
        """Return the reports of the last `steps` steps, at least `reports` of them; none if there are not so many."""
        first = bisect.bisect_right(self.training, self.step - steps, key=lambda report: report.step)
        count = max(reports, len(self.training) - first)
        is_enough = count <= len(self.training) and self.step - self.training[-count].step >= steps - self.interval
        return self.training[-count:] if is_enough else []

    @property
    def interval(self) -> int:
        """The number of steps between the last two reports."""
        return self.training[-1].step - self.training[-2].step if len(self.training) > 1 else 0

    def _add_metrics(self, step: int, values: Mapping[str, float | int]) -> bool:
        if all(is_finite(values.get(name)) for name in TRAINING):
            epoch = values.get("epoch", self.training[-1].epoch if self.training else 0.0)
            loss, rate, norm = (float(values[name]) for name in TRAINING)
            self.training.append(TrainingReport(step, loss, rate, norm, epoch))
            self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
            if len(self.training) > 2 * KEPT:
                del self.training[:-KEPT]
            self._update_lowest()
            return True
        if is_finite(values.get("validation_loss")):
            windows = values.get("validation_windows", 0)
            if not self.validation or windows == self.validation[0].windows:
                trained = statistics.fmean(one.loss for one in self.training[-MEAN:]) if self.training else math.nan
                self.validation.append(ValidationReport(step, values["validation_loss"], windows, trained))
                return True
        return False

    def _update_lowest(self) -> None:
        last = self.training[-3:]
        loss = statistics.median(one.loss for one in last)
        if len(last) == 3 and (self.lowest is None or loss < self.lowest.loss):
            self.lowest = Lowest(last[-1].step, loss, statistics.median(one.grad_norm for one in last))


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
