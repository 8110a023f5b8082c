"""The baselines in the report: lines in the curves, and a table."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_pages import page_of, rows_of, with_rows

from smollm2.report.baselines import baseline_table
from smollm2.report.reading import read_run

LOSSES = {"uniform": 5.5, "unigram": 3.6, "bigram": 3.0, "trigram": 2.5, "5-gram": 2.4}
EVENT: dict[str, Any] = {"step": 0, "kind": "baselines", "message": "", "losses": LOSSES, "bits_per_byte": {}}


def run_with(folder: Path, event: dict[str, Any]) -> Path:
    run = with_rows(folder / "run", rows_of(lambda step: 4 - step / 50, lambda step: 4 - step / 60))
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    return run


def test_baselines_are_lines_of_the_loss_alone(tmp_path: Path) -> None:
    charts = {data["title"]: data for data in page_of(run_with(tmp_path, EVENT)).data}
    assert charts["loss"]["baselines"] == [{"name": name, "y": loss} for name, loss in LOSSES.items()]


def test_the_table_names_the_first_validation_below_each(tmp_path: Path) -> None:
    table = baseline_table(read_run(run_with(tmp_path, EVENT)))
    assert table and [(row[0], row[3]) for row in table["rows"]] == [  # type: ignore[attr-defined]
        ("uniform", "10"),
        ("unigram", "30"),
        ("bigram", "70"),
        ("trigram", "–"),
        ("5-gram", "–"),
    ]


@pytest.mark.parametrize("losses", [None, 7, "x", [1.0], {"uniform": "x"}, {"uniform": None}, {"other": 1.0}])
def test_a_damaged_event_has_no_lines_and_no_table(losses: object, tmp_path: Path) -> None:
    run = run_with(tmp_path, {**EVENT, "losses": losses})
    assert baseline_table(read_run(run)) is None
    assert page_of(run).data[0]["baselines"] == []
