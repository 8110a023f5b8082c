"""The page that a run writes while it trains and at its end."""

import re
from pathlib import Path

import pytest
from report_pages import Page, page_of
from runs import tiny_config, write_tiny

from smollm2.errors import Interrupted
from smollm2.report.reading import read_run
from smollm2.report.sections import SECTIONS
from smollm2.report.tracker import ReportTracker
from smollm2.report.verdict import status_of, verdict_of
from smollm2.tracking.base import Fanout, Fence
from smollm2.training.loop import train


def test_a_run_leaves_its_page_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path))
    page = Page((tmp_path / "checkpoints" / "report.html").read_text(encoding="utf-8"))
    assert page.ids == [section.id for section in SECTIONS]
    assert "All 12 steps are done; " in page.text
    assert "Some files could not be read" not in page.text
    assert f"report                {tmp_path / 'checkpoints' / 'report.html'}" in capsys.readouterr().out


def test_a_run_on_a_very_short_text_shows_no_number_that_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, text="hi there\n")
    train(tiny_config(tmp_path, training__train_steps=2))
    rows = (tmp_path / "checkpoints" / "metrics.jsonl").read_text()
    assert "null" not in rows and "NaN" not in rows
    assert not re.search(r"\bnan\b", capsys.readouterr().out, re.IGNORECASE)
    page = Page((tmp_path / "checkpoints" / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


def test_the_page_of_a_stopped_run_reports_the_stop(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, training__train_steps=10**6, training__save_interval=10**6, training__time_limit=1))
    run = read_run(tmp_path / "checkpoints")
    assert status_of(run) == "stopped"
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert f"The run was stopped at step {run.last_step:,} of 1,000,000 and can be resumed" in page.text
    assert f"training.time_limit was reached; step {run.last_step} is saved" in page.text
    assert "--resume auto" in page.text


def test_the_page_is_written_after_validations_but_rarely(run: Path, copy: Path) -> None:
    page = copy / "report.html"
    tracker = Fanout([ReportTracker(copy, seconds_between=0.0)])
    tracker.log({"loss": 1.0}, 10)
    assert not page.exists()
    tracker.log({"validation_loss": 1.0}, 10)
    assert page.exists()
    page.unlink()
    tracker.log({"validation_loss": 1.0}, 20)
    assert not page.exists()  # the first took longer than a hundredth of the time since
    tracker.close()
    assert page.exists()


def test_an_unchanged_page_is_not_written_again(copy: Path) -> None:
    ReportTracker(copy).close()
    assert not (copy / "report.html").exists()


def test_a_page_that_cannot_be_written_is_reported_in_one_line(copy: Path) -> None:
    (copy / "report.html").mkdir()
    (copy / "report.html" / "x").write_text("")
    reported: list[str] = []
    fence = Fence("report.html", lambda: ReportTracker(copy), reported.append)
    Fanout([fence]).log({"loss": 1.0}, 400)
    fence.close()
    assert len(reported) == 1 and reported[0].startswith("report.html: turned off after an error (ResourceError: ")


CLOCK = {"seconds", "tokens_per_second"}


def timeless(run: Path) -> tuple[object, ...]:
    """Return a page without what depends on the clock and on the resume itself."""
    found = read_run(run)
    page = page_of(run)
    curves = [
        [{name: value for name, value in curve.items() if name not in CLOCK} for curve in data["curves"]]
        for data in page.data
        if "curves" in data and data["title"] != "tokens per second"
    ]
    events = [
        {name: value for name, value in event.items() if name not in ("time", "seconds")}
        for event in found.events
        if event["kind"] not in ("data", "baselines", "preflight", "start", "stopped", "resume", "first_step")
    ]
    data = {key: value for key, value in (found.latest("data") or {}).items() if key not in ("time", "step")}
    others = [data for data in page.data if "curves" not in data]
    return verdict_of(found), curves, others, events, data, found.settings, found.best, page.ids


def test_a_stopped_and_resumed_run_has_the_page_of_one_that_was_not(tmp_path: Path) -> None:
    """B7."""
    write_tiny(tmp_path)
    train(tiny_config(tmp_path))
    whole = timeless(tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("step_*.pt"):
        if path.name != "step_0004.pt":
            path.unlink()
    train(tiny_config(tmp_path), resume="auto")
    assert [event["kind"] for event in read_run(tmp_path / "checkpoints").events].count("resume") == 1
    assert timeless(tmp_path / "checkpoints") == whole
