"""What the commands print where the output cannot show it: escaped, never a traceback."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_tiny

from smollm2.cli.main import main

SNOW = "\u2603\u00e9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run in `runs-\u2603\u00e9`."""
    folder = tmp_path_factory.mktemp("output")
    config = write_tiny(folder)
    flags = [
        "--input_file",
        str(folder / "input.txt"),
        "--save_dir",
        str(folder / f"runs-{SNOW}"),
        "--train_steps",
        "2",
    ]
    assert main(["train", "--config", str(config), *flags]) == 0
    return folder


COMMANDS = {
    "generate": (["generate", f"runs-{SNOW}", "--prompt", SNOW, "--max_new_tokens", "2"], 0),
    "generate, a note": (["generate", f"runs-{SNOW}", "--prompt", SNOW * 200, "--max_new_tokens", "2"], 0),
    "evaluate": (["evaluate", f"runs-{SNOW}", "--input_file", "input.txt"], 0),
    "report": (["report", f"runs-{SNOW}"], 0),
    "report, a terminal": (["report", f"runs-{SNOW}", "--terminal"], 0),
    "export": (["export", f"runs-{SNOW}", f"runs-{SNOW}"], 4),
    "convert": (["convert", f"absent-{SNOW}", "step_0001"], 4),
    "landscape": (["landscape", f"absent-{SNOW}"], 4),
    "replay": (["replay", f"absent-{SNOW}"], 4),
    "plan": (["plan", "--save_dir", f"runs-{SNOW}"], 0),
    "train": (["train", "--save_dir", f"new-{SNOW}", "--train_steps", "1", "--resume", "auto"], 0),
    "an error": (["evaluate", f"absent-{SNOW}", "--input_file", "input.txt"], 4),
    "an unknown flag": (["train", f"--{SNOW}"], 2),
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(("words", "code"), COMMANDS.values(), ids=COMMANDS.keys())
def test_what_the_encoding_lacks_is_escaped(
    words: list[str], code: int, encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    assert main(words) == code


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_command_under_such_an_environment_prints_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "smollm2", "train", "--config", f"{SNOW}.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_takes_no_more_is_one_line_and_exit_code_6(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "smollm2", "plan", "--preset", "nano"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith("error: standard output: cannot be written to (")
    assert "Traceback" not in done.stderr


def test_a_closed_output_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m smollm2 plan --preset nano >&-"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m smollm2 train --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
