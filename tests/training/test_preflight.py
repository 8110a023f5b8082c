"""The checks of a run: each planted fault is named, sound runs are not, and nothing of the run is changed."""

import json
import random
import runpy
from pathlib import Path

import pytest
from preparing import prepare_run
from runs import ROOT, TINY, WORDS, outcome, tiny_config, write_tiny
from sabotages import SABOTAGES, Sabotage
from two_ranks import run_ranks

from smollm2.analysis.checks import Result, describe_result, run_checks
from smollm2.cli.main import main
from smollm2.model import transformer
from smollm2.training.loop import train
from smollm2.training.preflight import list_checks

R = random.Random(0)
DOCUMENTS = "\f".join(" ".join(R.choice(WORDS.split()) for _ in range(R.randint(5, 40))) for _ in range(90))


def result_of(name: str, sabotage: Sabotage, folder: Path) -> Result:
    """Run one check on a tiny run with several documents."""
    write_tiny(folder, text=DOCUMENTS, config=TINY.replace("num_key_value_heads: 1", "num_key_value_heads: 2"))
    run = sabotage.change(prepare_run(folder, {"data.document_separator": "\f", **dict(sabotage.flags)}).run)
    [(check, subject)] = [pair for pair in list_checks(run) if pair[0].name == name]
    return run_checks([(check, subject)])[0]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.fault)
def test_a_planted_fault_is_found_by_the_check_that_names_it(
    sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = Sabotage("", "", flags=sabotage.flags)
    assert result_of(sabotage.check, healthy, tmp_path / "sound").verdict == "pass"
    sabotage.plant(monkeypatch)
    found = result_of(sabotage.check, sabotage, tmp_path / "broken")
    assert found.verdict == sabotage.verdict, describe_result(found)
    assert found.finding.cause and found.finding.advice and found.finding.evidence, "it says why and what to do"


def test_the_page_about_the_checks_is_current() -> None:
    """If this fails: python scripts/write_doctor_docs.py."""
    script = runpy.run_path(str(ROOT / "scripts" / "write_doctor_docs.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["render"]()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path, text=DOCUMENTS)
    return tmp_path


def test_a_run_has_the_same_bits_with_and_without_a_preflight(folder: Path) -> None:
    train(tiny_config(folder, "with", training__preflight="true"))
    train(tiny_config(folder, "without"))
    assert outcome(folder / "with", 12) == outcome(folder / "without", 12)


def test_a_run_with_a_fault_ends_before_its_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(transformer, "rotate", lambda x, *tables: x)
    assert main(["train", "--training.preflight", "true"]) == 5
    error = capsys.readouterr().err
    assert "2 checks failed" in error and "positions are not applied" in error and "--skip_preflight" in error
    assert not (folder / "checkpoints").exists(), "nothing was trained, so nothing is left"
    assert main(["train", "--skip_preflight", "--train_steps", "1"]) == 0
    assert "the preflight was skipped" in (folder / "checkpoints" / "events.jsonl").read_text()


def test_a_resumed_run_makes_fewer_checks_and_records_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for steps in (2, 4):
        train(tiny_config(folder, training__preflight="true", training__train_steps=steps), resume="auto")
        found.append(json.loads((folder / "checkpoints" / "doctor.json").read_text()))
    assert [one["step"] for one in found] == [0, 2]
    names = [{check["name"] for check in one["checks"]} for one in found]
    assert "causality" in names[0] and "causality" not in names[1]
    assert {"save", "rows", "run folder"} <= names[1] < names[0]
    assert capsys.readouterr().out.count("preflight: ") == 2


def test_doctor_prints_a_table_and_leaves_a_file_that_the_report_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["doctor", "--short"]) == 0
    shown = capsys.readouterr().out
    assert "causality" in shown and "Machine and run" in shown and " passed, " in shown
    assert sorted(path.name for path in (folder / "checkpoints").glob("[!.]*")) == ["doctor.json", "run.log"]
    assert main(["train", "--train_steps", "1", "--training.preflight", "true"]) == 0
    page = (folder / "checkpoints" / "report.html").read_text()
    assert "Short form, before step 1: " in page


@pytest.mark.parametrize(("flags", "code"), [(["--strict"], 5), ([], 0)])
def test_doctor_prints_json_and_a_warning_counts_if_strict(
    flags: list[str], code: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["doctor", "--json", "--train_steps", "500", *flags]) == code
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert found["epochs"]["verdict"] == "warn" and found["epochs"]["evidence"]["epochs"] > 4


def test_ranks_are_checked_together(folder: Path) -> None:
    ended = run_ranks(lambda rank: main(["train", "--train_steps", "2", "--training.preflight", "true"]), folder)
    assert [rank.code for rank in ended] == [0, 0], ended
    found = json.loads((folder / "checkpoints" / "doctor.json").read_text())
    assert {one["name"]: one["verdict"] for one in found["checks"]}["ranks"] == "pass"
    assert [rank.out.count("preflight: ") for rank in ended] == [1, 0]


def test_a_shared_out_model_skips_the_checks_of_the_whole_and_makes_the_others(folder: Path) -> None:
    words = ["train", "--train_steps", "2", "--training.preflight", "true", "--training.sharding", "full"]
    ended = run_ranks(lambda rank: main(words), folder)
    assert [rank.code for rank in ended] == [0, 0], ended
    found = json.loads((folder / "checkpoints" / "doctor.json").read_text())
    verdicts = {one["name"]: one["verdict"] for one in found["checks"]}
    assert verdicts["causality"] == "skip"
    assert {verdicts[name] for name in ("reference", "loss", "finite differences", "next token", "save")} == {"pass"}
