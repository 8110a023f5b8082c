import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import tiny_config, write_tiny
from wandb_records import DIAGNOSIS

from smollm2.tracking.base import Fanout, Sample
from smollm2.tracking.tensorboard import start_tensorboard
from smollm2.training.loop import train


def start(folder: Path, resumed_step: int = 0) -> Fanout:
    tracker = start_tensorboard(folder, resumed_step, print)
    assert tracker is not None
    return Fanout([tracker])


def read(folder: Path) -> Any:
    """TensorBoard's own reader over all files of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tensorboard")
    tracker = start(folder)
    tracker.log_text([Sample("<b>*a*", "x\ny")], 10)
    tracker.log_diagnosis(DIAGNOSIS, 20)
    tracker.close()
    return read(folder)


def test_samples_are_texts_without_markup(recorded: Any) -> None:
    (event,) = recorded.Tensors("samples/0/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (10, b"    [<b>*a*]x\n    y")


def test_histograms_have_the_counts_and_edges_of_the_diagnosis(recorded: Any) -> None:
    (event,) = recorded.Histograms("gradients/histogram/model.norm.weight")
    found = event.histogram_value
    assert event.step == 20 and (found.min, found.max, found.num) == (-1, 2, 4)
    assert (list(found.bucket), list(found.bucket_limit)) == ([3, 1], [0, 2])
    assert found.sum == 3 * -0.5 + 1
    (event,) = recorded.Histograms("parameters/histogram/model.norm.weight")
    assert list(event.histogram_value.bucket) == [5, 6]


def test_norms_are_scalars_by_layer(recorded: Any) -> None:
    assert [(event.step, event.value) for event in recorded.Scalars("gradients/norm/layers.0")] == [(20, 5)]


def test_a_resumed_run_reads_back_with_the_values_of_metrics_jsonl(tmp_path: Path) -> None:
    """Steps 9 and 10 were written before the stop and come again: readers see them once."""
    write_tiny(tmp_path)
    flags = {"training__tensorboard": "true", "training__sample_tokens": 0}
    train(tiny_config(tmp_path, **flags, training__train_steps=10))
    (tmp_path / "checkpoints" / "step_0010.pt").unlink()
    train(tiny_config(tmp_path, **flags), resume="auto")
    rows = [json.loads(line) for line in (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("validation/bpb", "validation_bpb")):
        expected = [(row["step"], float(np.float32(row[key]))) for row in rows if key in row]
        assert len(expected) > 1 and scalars(tmp_path / "checkpoints", tag) == expected


def test_a_machine_without_tensorboard_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    reported: list[str] = []
    assert start_tensorboard(tmp_path, 0, reported.append) is None
    assert reported == [
        "TensorBoard: tensorboard is not installed, the run continues without it. "
        "Run pip install 'smollm2-training[tensorboard]'."
    ]


def test_the_tracker_imports_neither_torch_nor_tensorboard_before_it_is_used() -> None:
    program = "import sys, smollm2.tracking.tensorboard\nprint({'torch', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
