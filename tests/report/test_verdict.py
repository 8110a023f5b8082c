"""The verdict: its sentences, the status of a run, and one definition of each number."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_pages import Page, page_of, rows_of, with_rows

from smollm2.report.reading import read_run
from smollm2.report.verdict import describe_fit, notes_of, status_of


def summary_of(page: Page) -> dict[str, str]:
    """Return the key figures by name."""
    names = [page.texts.index(name) for name in ("Training loss", "Best validation loss", "Bits per byte", "Ran for")]
    return {page.texts[at]: page.texts[at + 1] for at in names}


def test_the_training_loss_is_that_of_the_last_report_everywhere(run: Path) -> None:
    page = page_of(run)
    last = [loss for _, loss in read_run(run).points("loss")][-1]
    assert summary_of(page)["Training loss"] == f"{last:.3f}"
    assert f"the training loss fell from 7.651 to {last:.3f}." in page.text
    assert f"Training loss 7.651 at step 10, {last:.4g} at 400" in page.text
    assert page.data[0]["curves"][0]["y"][-1] == pytest.approx(last, rel=1e-5)


def test_a_run_without_validation_has_a_sentence_and_no_number(tmp_path: Path) -> None:
    """The text is too short for a validation split."""
    folder = with_rows(tmp_path / "run", [{"step": step, "loss": 2.0, "validation_bpb": None} for step in (1, 2, 3)])  # type: ignore[dict-item]
    event = {"step": 0, "kind": "data", "message": "", "validation_tokens": 0, "train_tokens": 5, "tokens": 5}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    page = page_of(folder)
    assert "There was no validation, because the text is too short for a validation split." in page.text
    assert "none: the text is too short" in page.text
    assert summary_of(page)["Best validation loss"] == summary_of(page)["Bits per byte"] == "–"
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


def rise(step: int) -> float:
    return 3 + abs(step - 40) / 50


ROSE = "the validation loss rose by 33% since step 40"


MEMORIZED = "The training loss is 48% below the validation loss: part of the text is memorized."


@pytest.mark.parametrize(
    ("training", "validation", "clause", "note"),
    [
        (lambda step: 4 - step / 50, lambda step: 4 - step / 60, ", and the run does not overfit", ""),
        (
            lambda step: 4 - step / 50,
            rise,
            f"; the run overfits: {ROSE}, while the training loss fell",
            "Use more text or fewer steps, or the best checkpoint.",
        ),
        (rise, rise, f"; the run got worse: {ROSE}", "The training loss rose too: a lower learning rate may help."),
        (lambda step: 3 - step / 60, lambda step: 3.0 + step / 10**4, ", and the run does not overfit", MEMORIZED),
    ],
    ids=["falling", "overfitting", "worse", "memorized"],
)
def test_whether_it_overfits(
    tmp_path: Path, training: Callable[[int], float], validation: Callable[[int], float], clause: str, note: str
) -> None:
    run = read_run(with_rows(tmp_path / "run", rows_of(training, validation)))
    assert describe_fit(run) == clause
    assert notes_of(run) == ([note] if note else [])


def test_the_last_validation_of_the_whole_split_does_not_count_as_a_rise(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step": step, "validation_loss": 4 - step / 50} for step in (20, 40, 60, 80)]
    rows += [{"step": step, "loss": 4 - step / 50} for step in (1, 99)]
    rows.append({"step": 100, "validation_loss": 3.9})
    assert "does not overfit" in describe_fit(read_run(with_rows(tmp_path / "run", rows)))


@pytest.mark.parametrize(
    ("events", "lock", "status"),
    [
        (["start", "done"], False, "finished"),
        (["start", "stopped"], False, "stopped"),
        (["start", "failed"], True, "failed"),
        (["start"], True, "running"),
        (["start", "stopped", "start"], False, "interrupted"),
        ([], False, "interrupted"),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, events: list[str], lock: bool, status: str) -> None:
    run = with_rows(tmp_path / "run", [{"step": 5, "loss": 2.0}])
    rows = [{"step": 5, "kind": kind, "message": "", "time": 1.0} for kind in events]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if lock:
        from smollm2.storage.locks import lock_folder

        with lock_folder(run):
            assert status_of(read_run(run)) == status
    else:
        assert status_of(read_run(run)) == status
