"""What a launcher leaves in the environment: empty means unset, and what is missing is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_tiny

from smollm2.cli.environment import check_launch, clean_environment
from smollm2.cli.main import main
from smollm2.errors import ConfigError

NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_RANK"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_variable_is_unset(name: str, text: str) -> None:
    environment = {name: text, "OTHER": ""}
    clean_environment(environment)
    assert environment == {"OTHER": ""}


@pytest.mark.parametrize("text", ["x", "-1", "1.0"])
def test_a_rank_that_is_not_a_number_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^RANK: must be a whole number .got '{text}'"):
        clean_environment({"RANK": text})


WHOLE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["MASTER_ADDR"], "MASTER_ADDR: not set, but RANK is 0."),
        (["MASTER_ADDR", "MASTER_PORT"], "MASTER_ADDR, MASTER_PORT: not set, but RANK is 0."),
        (["RANK"], "RANK: not set, but WORLD_SIZE is 1."),
        (["WORLD_SIZE"], "WORLD_SIZE: not set, but RANK is 0."),
    ],
)
def test_a_missing_variable_is_named(missing: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launch({name: value for name, value in WHOLE.items() if name not in missing})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("environment", [{}, WHOLE, {"LOCAL_RANK": "0"}])
def test_a_complete_environment_is_accepted(environment: dict[str, str]) -> None:
    check_launch(environment)


def test_a_command_with_empty_variables_runs(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    command = [sys.executable, "-m", "smollm2", "train", "--no_such_flag"]
    empty = {**os.environ, **dict.fromkeys(NAMES, "")}
    done = subprocess.run(command, cwd=tmp_path, env=empty, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_run_with_empty_variables_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.setenv(name, "")
    assert main(["train", "--train_steps", "1"]) == 0
