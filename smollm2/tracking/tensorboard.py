"""The mirror for TensorBoard, in <save_dir>/tensorboard: the names of wandb.py, so that both show the same.

torch writes the files; only it and the package `tensorboard` are needed, and they are imported on the fence's thread.
"""

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smollm2.tracking.base import Diagnosis, Fence, Histogram, Sample, Say, Tracker
from smollm2.tracking.charts import diagnosis_metrics, group_metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def start_tensorboard(folder: Path, resumed_step: int, say: Say) -> Tracker | None:
    """A tracker that writes to `folder`/tensorboard, or None with one line where the package is absent."""
    if importlib.util.find_spec("tensorboard") is None:
        say(
            "TensorBoard - tensorboard is not installed - training goes on without it; "
            "pip install 'smollm2-training[tensorboard]'"
        )
        return None
    return Fence("TensorBoard", lambda: open_writer(folder / "tensorboard", resumed_step), say)


def open_writer(folder: Path, resumed_step: int) -> "TensorBoardTracker":
    """Append to what is there; readers leave out what an earlier run wrote after `resumed_step`, since it comes again."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardTracker(SummaryWriter(str(folder), purge_step=resumed_step + 1, flush_secs=10))


class TensorBoardTracker(Tracker):
    """Scalars, texts and histograms of one run; lives behind a fence."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self.writer = writer

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Scalars."""
        for name, value in group_metrics(metrics).items():
            self.writer.add_scalar(name, value, step)

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """One text a prompt; as code, in which Markdown finds nothing to obey."""
        for number, sample in enumerate(samples):
            text = "\n".join(f"    {line}" for line in f"[{sample.prompt}]{sample.text}".splitlines())
            self.writer.add_text(f"samples/{number}", text, step)

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """Scalars by layer, histograms by parameter."""
        for name, value in diagnosis_metrics(diagnosis).items():
            self.writer.add_scalar(name, value, step)
        for name, histogram in diagnosis.gradient_histograms.items():
            self._add_histogram(f"gradients/histogram/{name}", histogram, step)
        for name, histogram in diagnosis.weight_histograms.items():
            self._add_histogram(f"parameters/histogram/{name}", histogram, step)

    def close(self) -> None:
        """Write the rest."""
        self.writer.close()

    def _add_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """The sums are those of the bins' middles: no more is known of the values."""
        edges, counts = list(histogram.edges), list(histogram.counts)
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self.writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )
