"""`smollm2 plan` with --devices and --machines, and the commands and plans that docs/scale.md shows."""

import re
import shlex
from pathlib import Path

import pytest
from commands import check_refused
from runs import ROOT, write_tiny

from smollm2.cli.main import build_parser, main

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^\$ smollm2 plan (.*)\n((?:.+\n)+?)```", PAGE, re.MULTILINE)
RUNS = re.findall(r"^(?:torchrun|python) .*?train\.py (.*)$", PAGE, re.MULTILINE)


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> list[list[str]]:
    """Return the rows that the command prints, in words."""
    assert main(["plan", "--preset", "smollm2-135m", *flags]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_flags_of_a_cluster_add_rows_and_change_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = plan(capsys)
    cluster = plan(capsys, "--devices", "8", "--machines", "2")
    assert cluster[: len(plain)] == plain
    assert cluster[len(plain)] == ["cluster", "2", "machines", "with", "8", "devices", "each,", "16", "together"]


def test_one_of_the_flags_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ["cluster", "1", "machine", "with", "3", "devices"] in plan(capsys, "--devices", "3")
    assert any(row[:2] == ["cluster", "2"] for row in plan(capsys, "--machines", "2"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--devices", "0"], "--devices: must be a whole number from 1 to 1,024 (got '0'). See smollm2 plan --help."),
        (["--devices", "-8"], "--devices: must be a whole number from 1 to 1,024 (got '-8')"),
        (["--devices", "2.5"], "--devices: must be a whole number from 1 to 1,024 (got '2.5')"),
        (["--devices", "all"], "--devices: must be a whole number from 1 to 1,024 (got 'all')"),
        (["--machines", "0"], "--machines: must be a whole number from 1 to 65,536 (got '0')"),
        (["--machines", "1e3"], "--machines: must be a whole number from 1 to 65,536 (got '1e3')"),
        (["--devices"], "--devices: expected one argument"),
        (["--device", "8"], "--device: unknown option. Did you mean --devices?"),
        (["--nodes", "2"], "--nodes: unknown option. See smollm2 plan --help."),
    ],
)
def test_a_number_of_devices_that_makes_no_sense_is_refused_in_one_line(
    flags: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    check_refused(["plan", *flags], 2, words, tmp_path, capsys)


@pytest.mark.parametrize(("flags", "shown"), PLANS)
def test_the_plans_of_the_page_are_what_is_printed(
    flags: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of the page is the beginning of a row: the rest may depend on the machine."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *shlex.split(flags)]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown.splitlines() if not any(row.startswith(line) for row in rows)] == []


@pytest.mark.parametrize("flags", RUNS)
def test_the_runs_of_the_page_are_understood(flags: str) -> None:
    _, unknown = build_parser().parse_known_args(["train", *shlex.split(flags)])
    assert unknown == []


def test_the_page_has_seven_plans_and_seven_commands() -> None:
    assert (len(PLANS), len(RUNS) + PAGE.count("\nsbatch ")) == (7, 7)
