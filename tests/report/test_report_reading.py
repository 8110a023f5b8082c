"""Run folders that are damaged, foreign or incomplete."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from report_pages import page_of

from smollm2.cli.main import main
from smollm2.errors import DataError
from smollm2.report.reading import read_run, read_runs
from smollm2.report.sections import SECTIONS


def spoil_with_garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5000) + b"\n")


def spoil_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def spoil_as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = [
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "diagnostics.jsonl",
    "landscape.json",
    "data.json",
    "best.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "spoil", [Path.unlink, spoil_with_garbage, spoil_as_folder, lambda path: path.write_bytes(b"")]
)
def test_a_file_that_is_absent_or_damaged_is_named_and_the_page_is_built(
    copy: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    """D10."""
    spoil(copy / name)
    page = page_of(copy)
    assert page.ids == [section.id for section in SECTIONS]
    is_optional = spoil is Path.unlink and name in ("landscape.json", "data.json", "best.json")
    is_empty = (copy / name).is_file() and not (copy / name).read_bytes() and name.endswith("l")
    is_named = any(name in problem for problem in read_run(copy).problems)
    assert is_named == (not is_optional and not (is_empty and name != "config.yaml"))
    assert is_named == (f"{name}" in page.text.partition("Some files could not be read")[2][:400])


ROWS = [
    b"{",
    b"[1]",
    b"null",
    b'{"step": -1}',
    b'{"step": true, "loss": 1}',
    b'{"step": "5"}',
    b'{"step": 5, "loss": "low"}',
    b'{"step": 5, "loss": [1]}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
    b"\xff\xfe",
]


def test_damaged_lines_are_counted_and_the_others_kept(copy: Path) -> None:
    before = read_run(copy)
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(row + b"\n" for row in ROWS))
    after = read_run(copy)
    assert repr(after.metrics) == repr(before.metrics)
    lines = len((copy / "metrics.jsonl").read_bytes().splitlines()) - len(ROWS) + 1
    assert after.problems == [f"metrics.jsonl:{lines}: {len(ROWS)} damaged lines are omitted"]


def test_a_torn_last_line_is_omitted_silently(copy: Path) -> None:
    spoil_by_cutting(copy / "metrics.jsonl")
    assert read_run(copy).problems == []
    assert len(read_run(copy).metrics["step"]) == len(read_run(copy).metrics["loss"])


@pytest.mark.parametrize(
    "row",
    [
        '{"step": 1, "kind": "skip"}',
        '{"step": 1, "kind": 5, "message": "x"}',
        '{"step": 1, "kind": "skip", "message": "x", "time": "noon"}',
    ],
)
def test_a_malformed_event_is_counted(copy: Path, row: str) -> None:
    (copy / "events.jsonl").write_text(row + "\n")
    assert read_run(copy).problems == ["events.jsonl:1: 1 damaged line is omitted"]


def test_rows_of_two_runs_in_one_file_are_drawn_by_step(copy: Path) -> None:
    rows = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(rows + rows)
    steps = read_run(copy).metrics["step"]
    assert list(steps) == sorted(steps)


def test_numbers_beyond_all_bounds_draw_a_page(copy: Path) -> None:
    rows = [
        {"step": step, "loss": value, "tokens": 1e300, "tokens_per_second": 1e-300}
        for step, value in enumerate([1e308, -1e308, 5e-324, 0.0])
    ]
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "loss": NaN}\n{"step": 9, "loss": 1e999}\n'
    )
    assert page_of(copy).ids


def test_a_folder_that_is_not_a_run_folder_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="neither metrics"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path / "absent")]) == 3
    assert "is not a folder. Specify the --save_dir of a run." in capsys.readouterr().err


def test_runs_with_the_same_folder_name_are_distinguished(run: Path, copy: Path) -> None:
    names = [one.name for one in read_runs([run, copy])]
    assert len(set(names)) == 2 and all(name.endswith("/run") for name in names)
