"""The curves: thinning, smoothing and marks."""

import json
import math
import random
from pathlib import Path

import pytest
from report_pages import page_of, with_rows
from run_folders import write_run

from smollm2.report.curves import thin


def test_the_data_of_the_loss_chart_are_the_rows(run: Path) -> None:
    loss = page_of(run).data[0]["curves"][0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert loss["step"] == [row["step"] for row in rows]
    assert loss["tokens"] == [row["tokens"] for row in rows]
    assert loss["y"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    seconds = sum(20_480 / row["tokens_per_second"] for row in rows)
    assert loss["seconds"][-1] == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize(("reports", "smoothing"), [(13, "0.0"), (99, "0.0"), (100, "0.6")])
def test_short_runs_are_not_smoothed(tmp_path: Path, reports: int, smoothing: str) -> None:
    page = page_of(with_rows(tmp_path / "run", [{"step": step, "loss": 2.0} for step in range(1, reports + 1)]))
    (slider,) = [attrs for tag, attrs in page.tags if attrs.get("name") == "smoothing"]
    assert slider["value"] == smoothing


def test_warmup_resumes_skips_and_the_best_checkpoint_are_marked_on_the_loss(tmp_path: Path) -> None:
    marks = page_of(write_run(tmp_path, training__warmup_steps="45")).data[0]["marks"]
    assert marks["warmup"]["step"] == 45 and marks["warmup"]["tokens"] == 45 * 2048
    assert [place["step"] for place in marks["resume"]] == [200]
    assert [place["step"] for place in marks["skip"]] == [200]
    assert marks["best"]["step"] == 400 and marks["best"]["y"] == pytest.approx(4.227, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2000, 2001, 100_000])
def test_thinning_keeps_the_ends_and_every_extreme(count: int) -> None:
    noise = random.Random(count)
    values = [noise.gauss(0, 1) for _ in range(count)]
    spikes = sorted({0, count // 3, count // 2, count - 1})
    for number, index in enumerate(spikes):
        values[index] = (-1) ** number * (100 + number)
    kept, means = thin(values, 2000)
    assert len(kept) <= 2000 and len(means) == len(kept)
    assert kept == sorted(set(kept))
    assert set(spikes) <= set(kept)
    assert min(values) <= min(means) <= max(means) <= max(values)


def test_thinning_keeps_the_minimum_and_maximum_of_each_bucket() -> None:
    noise = random.Random(1)
    values = [noise.gauss(0, 1) for _ in range(10_002)]
    kept, _ = thin(values, 202)
    for start in range(1, 10_001, 100):
        bucket = range(start, start + 100)
        assert {min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)} <= set(kept)


def test_missing_numbers_are_not_points() -> None:
    assert thin([math.nan, 1.0, math.nan, 2.0], 4) == ([1, 3], [1.0, 2.0])
