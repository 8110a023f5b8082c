"""The comparison of several runs."""

import json
from collections.abc import Callable
from pathlib import Path

from report_pages import MEGABYTE, build_page, page_of, rows_of, with_rows, write_many_rows
from run_folders import write_run

from smollm2.report.compare import COMPARISON, comparable_metric, compare_best
from smollm2.report.reading import read_runs


def test_runs_are_compared_key_by_key_and_the_best_is_marked(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, name="other", training__learning_rate="1e-3", training__seed="7")
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 400, "validation_loss": 1.5, "validation_bpb": 0.5}) + "\n")
    page = page_of(run, other)
    assert page.ids == [section.id for section in COMPARISON]
    assert {"training.learning_rate", "training.seed", "0.001", "0.006"} <= set(page.texts)
    assert "training.optimizer" not in page.text
    assert page.texts[page.texts.index(" (best)") - 1] == "other"
    assert (
        "other is better than run: its best validation loss is 1.500 instead of 4.227, lower by 2.727 (64.5%)."
        in page.text
    )
    assert {curve["run"] for curve in page.data[0]["curves"]} == {"run", "other"}


def with_time(folder: Path, seconds: float) -> None:
    """Give a run a start and an end that many seconds apart, and the same data as the others."""
    data = {"step": 0, "kind": "data", "message": "", "tokens": 100, "validation_tokens": 10, "vocab_size": 5}
    events = [("start", 0, 1000.0), ("done", 100, 1000.0 + seconds)]
    rows = [data, *({"step": step, "kind": kind, "message": "", "time": time} for kind, step, time in events)]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compared(tmp_path: Path, first: Callable[[int], float], second: Callable[[int], float]) -> list[str]:
    """Return the sentences about two runs that validate at steps 10 to 90."""
    for name, losses, seconds in (("a", first, 90.0), ("b", second, 60.0)):
        rows = rows_of(losses, losses)
        for row in rows:
            row |= {"tokens": row["step"] * 10, "tokens_per_second": 10.0} if "loss" in row else {}
        with_time(with_rows(tmp_path / name, rows), seconds)
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    return compare_best(runs, comparable_metric(runs))


def test_the_comparison_names_the_better_run_the_difference_and_the_time(tmp_path: Path) -> None:
    assert compared(tmp_path, lambda step: 4 - step / 50, lambda step: 4 - step / 60) == [
        "a is better than b: its best validation loss is 2.200 instead of 2.500, lower by 0.300 (12.0%).",
        "It is lower at each of the 9 validations that both have, by 0.033 to 0.300.",
        "It ran for 1 min 30 s instead of 1 min 0 s (50% longer), and reached 2.500 after 1 min 20 s of training.",
    ]


def test_a_difference_that_changes_its_sign_is_not_clear(tmp_path: Path) -> None:
    sentences = compared(
        tmp_path, lambda step: 4 - step / 50, lambda step: 4 - step / 50 + (0.1 if step > 50 else -0.1)
    )
    assert sentences[1] == "It is lower at 4 of the 9 validations that both have: the difference is not clear."


def test_runs_on_different_data_are_compared_by_bits_per_byte(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, name="other")
    text = (other / "events.jsonl").read_text()
    (other / "events.jsonl").write_text(text.replace('"vocab_size": 4096', '"vocab_size": 257'))
    assert comparable_metric(read_runs([run, run])) == "validation_loss"
    assert comparable_metric(read_runs([run, other])) == "validation_bpb"


def test_many_runs_are_a_page_under_6_megabytes(tmp_path: Path) -> None:
    run = write_many_rows(tmp_path, 5000)
    assert len(build_page(read_runs([run] * 30)).encode()) < 6 * MEGABYTE
