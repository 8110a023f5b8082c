"""run_training.sh's choices: config, processes, and the commands that it prints."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from smollm2.cli.launch import (
    SHIPPED_CONFIG,
    choose_config,
    count_processes,
    describe_launcher,
    describe_next_steps,
    has_flag,
    main,
)
from smollm2.errors import ConfigError
from smollm2.plan.machine import Machine
from smollm2.runtime.commands import CALLER

ROOT = Path(__file__).resolve().parents[2]
SLOW, FAST = Machine("cpu-avx2", 2), Machine("NVIDIA H200", 16, gpus=64)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped config, as the current folder."""
    shutil.copy(ROOT / "config.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CALLER, raising=False)
    return tmp_path


def test_the_launcher_knows_the_shipped_config() -> None:
    digest = hashlib.sha256((ROOT / "config.yaml").read_bytes()).hexdigest()
    assert digest == SHIPPED_CONFIG, f'config.yaml changed: write SHIPPED_CONFIG = "{digest}" in smollm2/cli/launch.py'


def test_the_shipped_config_gives_way_to_nano_on_a_slow_machine_and_the_minutes_are_announced(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_config([], SLOW, 1) == ["--preset", "nano"]
    shown = capsys.readouterr().out
    assert re.search(r"so this run uses the small `nano` preset \(about [0-9.]+ (seconds|minutes|hours)\)\.", shown)
    assert "./run_training.sh --config config.yaml" in shown


def test_a_fast_machine_an_edited_config_and_a_missing_one_keep_their_config(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_config(["--train_steps", "9"], FAST, 64) == ["--train_steps", "9"]
    with (project / "config.yaml").open("a") as file:
        file.write("# edited\n")
    assert choose_config([], SLOW, 1) == []
    (project / "config.yaml").unlink()
    assert choose_config([], SLOW, 1) == []
    assert capsys.readouterr().out == ""


def test_an_announced_time_comes_from_an_earlier_run_if_there_is_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = (
        '{"cpu-avx2, float32, muon, 2 cores": [{"flops": 1e9, "seconds_per_block": 1.0, "measured": "2026-11-25"}]}'
    )
    (project / "cache").mkdir()
    (project / "cache" / "throughput.json").write_text(record)
    choose_config([], SLOW, 1)
    assert "preset (about 7.2 hours)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"NUM_PROCESSES": "4"}, 4),
        ({"NUM_PROCESSES": "", "CUDA_VISIBLE_DEVICES": ""}, 1),
    ],
)
def test_the_number_of_processes_is_that_of_the_gpus_or_the_one_that_is_asked_for(
    environment: dict[str, str], processes: int
) -> None:
    assert count_processes(environment) == processes


@pytest.mark.parametrize("text", ["two", "-1", "0", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=f'NUM_PROCESSES: "{text}" is not a positive whole number. Use a number such as 2'
    ):
        count_processes({"NUM_PROCESSES": text})


def test_a_flag_is_found_in_both_forms() -> None:
    assert has_flag(["--resume", "auto"], ("--resume",)) and has_flag(["--resume=auto"], ("--resume",))
    assert not has_flag(["--resumed", "auto"], ("--resume",))


def test_the_commands_that_are_printed_exist_where_the_user_is(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "  train longer       ./run_training.sh --train_steps N" in describe_next_steps()
    monkeypatch.setenv(CALLER, str(project.parent))
    assert f"  run the tests      {project.name}/run_tests.sh" in describe_next_steps()
    assert describe_launcher({"NUM_PROCESSES": "2"}) == f"NUM_PROCESSES=2 {project.name}/run_training.sh"
    assert describe_launcher({}) == f"{project.name}/run_training.sh"


def test_a_wrong_flag_is_reported_before_anything_is_measured(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(project), "--no_such_flag"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("--no_such_flag") == 1
    os.environ.pop(CALLER, None)
