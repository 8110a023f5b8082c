"""The TensorBoard tracker, which writes to <save_dir>/tensorboard, with the same metric names as the W&B tracker.

torch's SummaryWriter writes the files; it and the package `tensorboard` are imported on the tracker's own thread.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from smollm2.tracking.base import Diagnosis, Fence, Histogram, Message, Metrics, Report, Sample, Samples, Tracker
from smollm2.tracking.charts import diagnosis_metrics, group_metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def start_tensorboard(folder: Path, resumed_step: int, report: Report) -> Tracker | None:
    """Return a tracker that writes to `folder`/tensorboard; if the package is missing, report this and return None."""
    if importlib.util.find_spec("tensorboard") is None:
        report(
            "TensorBoard: tensorboard is not installed, the run continues without it. "
            "Run pip install 'smollm2-training[tensorboard]'."
        )
        return None
    return Fence("TensorBoard", lambda: open_writer(folder / "tensorboard", resumed_step), report)


def open_writer(folder: Path, resumed_step: int) -> "TensorBoardTracker":
    """Return a tracker that appends to earlier files.

    TensorBoard ignores what they contain after `resumed_step`, because the resumed run writes it again.
    """
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardTracker(SummaryWriter(str(folder), purge_step=resumed_step + 1, flush_secs=10))


class TensorBoardTracker(Tracker):
    """Writes the scalars, texts and histograms of one run. It runs on its own thread, in a `Fence`."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self.writer = writer

    def on(self, message: Message) -> None:
        """Write metrics, samples and diagnostics; other messages are ignored."""
        match message.content:
            case Metrics(values):
                for name, value in group_metrics(values).items():
                    self.writer.add_scalar(name, value, message.step)
            case Samples(samples):
                for number, sample in enumerate(samples):
                    self.writer.add_text(f"samples/{number}", as_code(sample), message.step)
            case Diagnosis() as diagnosis:
                for name, value in diagnosis_metrics(diagnosis).items():
                    self.writer.add_scalar(name, value, message.step)
                for name, histogram in diagnosis.gradient_histograms.items():
                    self._add_histogram(f"gradients/histogram/{name}", histogram, message.step)
                for name, histogram in diagnosis.weight_histograms.items():
                    self._add_histogram(f"parameters/histogram/{name}", histogram, message.step)

    def close(self) -> None:
        """Flush and close the files."""
        self.writer.close()

    def _add_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Add a histogram; its sum and its sum of squares are computed from the midpoints of its bins."""
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


def as_code(sample: Sample) -> str:
    """Return the sample as a Markdown code block, where markup has no effect."""
    return "\n".join(f"    {line}" for line in f"[{sample.prompt}]{sample.text}".splitlines())
