import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from smollm2.errors import ResourceError
from smollm2.tracking.base import Diagnosis, Fanout, Histogram, Landscape, Sample
from smollm2.tracking.jsonl import JsonlTracker, read_values


def rows_of(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def log_steps(folder: Path, resumed_step: int, steps: range) -> list[str]:
    reported: list[str] = []
    files = JsonlTracker(folder, resumed_step, reported.append)
    tracker = Fanout([files])
    for step in steps:
        tracker.log({"loss": 1 / step}, step)
    tracker.close()
    return reported


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    Fanout([JsonlTracker(tmp_path, 0, print)]).log({"tokens": 512, "loss": 2.5}, 1)
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 512, "loss": 2.5}]


def test_each_sample_is_a_row(tmp_path: Path) -> None:
    Fanout([JsonlTracker(tmp_path, 0, print)]).log_text([Sample("", "a\nb"), Sample("Ö", "\udc80\u2028\x85")], 3)
    assert rows_of(tmp_path / "samples.jsonl") == [
        {"step": 3, "prompt": "", "text": "a\nb"},
        {"step": 3, "prompt": "Ö", "text": "\udc80\u2028\x85"},
    ]


def test_an_event_has_its_details_and_the_time(tmp_path: Path) -> None:
    Fanout([JsonlTracker(tmp_path, 0, print)]).log_event(
        "skip", "skipped", 3, ids=[1, 2], norm=math.inf, path=Path("a")
    )
    (row,) = rows_of(tmp_path / "events.jsonl")
    assert row.pop("time") > 1e9  # type: ignore[operator]
    assert row == {"step": 3, "kind": "skip", "message": "skipped", "ids": [1, 2], "norm": None, "path": "a"}


def test_a_diagnosis_is_a_row_of_rounded_numbers_without_histograms(tmp_path: Path) -> None:
    histogram = {"w": Histogram((1,), (0.0, 1.0))}
    diagnosis = Diagnosis({"w": 1.23456}, {"w": 2.0}, {"w": math.inf}, {"b": {"rms": 0.5}}, 0.25, histogram, histogram)
    Fanout([JsonlTracker(tmp_path, 0, print)]).log_diagnosis(diagnosis, 3)
    assert rows_of(tmp_path / "diagnostics.jsonl") == [
        {
            "step": 3,
            "gradient_norms": {"w": 1.235},
            "weight_norms": {"w": 2.0},
            "update_ratios": {"w": None},
            "activations": {"b": {"rms": 0.5}},
            "clipped": 0.25,
        }
    ]


def test_the_newest_landscape_replaces_the_one_before(tmp_path: Path) -> None:
    files = JsonlTracker(tmp_path, 0, print)
    tracker = Fanout([files])
    for loss in (2.0, 1.0):
        tracker.log_landscape(Landscape(loss, (0,), (loss,), (0,), ((math.nan,),), seed=7, targets=8), 5)
    found = json.loads((tmp_path / "landscape.json").read_text())
    assert (found["step"], found["loss"], found["grid"]) == (5, 1.0, [[None]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path, value: float) -> None:
    Fanout([JsonlTracker(tmp_path, 0, print)]).log({"loss": value}, 1)
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_a_run_cut_anywhere_after_its_checkpoint_and_resumed_leaves_the_same_bytes(tmp_path: Path) -> None:
    """E3: no row is missing, torn or double."""
    log_steps(tmp_path, 0, range(1, 7))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    checkpoint = len(b"".join(whole.splitlines(keepends=True)[:3]))
    for cut in range(checkpoint, len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert log_steps(tmp_path, 3, range(4, 7)) == []
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("resumed_step", "kept"), [(0, []), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3, 4]), (1, [1])]
)
def test_a_resume_keeps_the_rows_up_to_its_step(tmp_path: Path, resumed_step: int, kept: list[int]) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 2, 3, 4)))
    JsonlTracker(tmp_path, resumed_step, print).close()
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        assert [row["step"] for row in rows_of(tmp_path / name)] == kept


def test_a_resume_into_an_empty_folder_begins_after_its_step(tmp_path: Path) -> None:
    log_steps(tmp_path, 5, range(6, 8))
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [6, 7]


DAMAGED = [b"", b"{", b"\xff\x00", b"null", b"[1]", b'{"loss": 1}', b'{"step": "2"}', b'{"step": true}', b"[" * 100_000]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_in_the_middle_is_counted_and_moved_to_another_file(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n' + damaged + b"\n")
    reported = log_steps(tmp_path, 2, range(3, 4))
    assert reported == ["metrics.jsonl:2: 2 damaged lines were moved to metrics.jsonl.damaged"]
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == (damaged + b"\n") * 2


def test_a_kill_leaves_whole_rows_without_a_gap(tmp_path: Path) -> None:
    program = (
        "import itertools, sys; from pathlib import Path; from smollm2.tracking.base import Fanout; from smollm2.tracking.jsonl import JsonlTracker\n"
        "tracker = Fanout([JsonlTracker(Path(sys.argv[1]), 0, print)])\n"
        "for step in itertools.count(1):\n"
        "    tracker.log({'loss': 1.0}, step)\n"
        "    if step == 200: print('enough', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"enough\n"
    process.kill()
    process.wait()
    process.stdout.close()
    *lines, _ = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    steps = [json.loads(line)["step"] for line in lines]
    assert len(steps) >= 200 and steps == list(range(1, len(steps) + 1))


def test_a_full_disk_costs_no_row(tmp_path: Path) -> None:
    """The largest file size of this process stands for the full disk; it cuts inside a row. Python ignores SIGXFSZ."""
    resource = pytest.importorskip("resource")
    reported: list[str] = []
    files = JsonlTracker(tmp_path, 0, reported.append)
    tracker = Fanout([files])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (110, before[1]))
        for step in range(1, 9):
            tracker.log({"loss": 1.0}, step)
        files.sync()
        while_full = (tmp_path / "metrics.jsonl").stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracker.log({"loss": 1.0}, 9)
    tracker.close()
    assert while_full == 110
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    (line,) = reported
    assert line.startswith("metrics.jsonl: cannot be written (") and line.endswith(
        "); its rows are kept in memory. Free some disk space."
    )


def test_rows_that_were_never_written_are_counted_at_the_end(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    reported: list[str] = []
    files = JsonlTracker(tmp_path, 0, reported.append)
    tracker = Fanout([files])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
        tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert reported[1:] == [f"{tmp_path}: 2 rows were never written, the disk is full."]


def test_a_folder_that_cannot_hold_the_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(
        ResourceError, match=r"events\.jsonl: cannot be written \(Is a directory\)\. .*another --save_dir"
    ):
        JsonlTracker(tmp_path, 0, print)


def test_the_values_of_a_metric_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 1, "validation_loss": 9}\nnull\n{\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.5}\n'
    )
    assert read_values(path, "loss") == [3.0, 2.5]
