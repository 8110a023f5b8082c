"""The shell scripts, run in a small checkout of their own.

Their environment is real; its pip is a stand-in that writes down what it is asked for, except in the one test that
installs a project without dependencies with the real one. Nothing is downloaded.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = """
import json, os, sys, time
if sys.argv[1] == "--version":
    sys.exit()
with open("pip_calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
time.sleep(float(os.environ.get("PIP_SECONDS", 0)))
sys.exit(int(os.environ.get("PIP_EXIT", 0)))
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """
import zipfile
INFO = "tiny-1.dist-info"
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel_directory + "/" + name, "w") as wheel:
        wheel.writestr("tiny_was_installed.py", "")
        wheel.writestr(INFO + "/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: wandb\\n")
        wheel.writestr(INFO + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(INFO + "/RECORD", "")
    return name
"""


def make_checkout(folder: Path) -> Path:
    """Make a folder with the scripts and what they install from, no .venv."""
    folder = folder / "a checkout"
    folder.mkdir()
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt", "run_training.sh", "run_tests.sh"):
        shutil.copy(ROOT / name, folder)
    return folder


def furnish(checkout: Path) -> Path:
    """Give a checkout an environment whose pip is the stand-in."""
    venv.create(checkout / ".venv", symlinks=True)
    pip = site_packages(checkout) / "pip"
    pip.mkdir()
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(PIP)
    return checkout


def make_trainer(checkout: Path) -> Path:
    """Give a furnished checkout what it needs to train."""
    borrow_packages(checkout)
    shutil.copytree(ROOT / "smollm2", checkout / "smollm2")  # with its compiled files, as in a folder that was used
    shutil.copytree(ROOT / "configs", checkout / "configs")
    for name in ("config.yaml", "train.py"):
        shutil.copy(ROOT / name, checkout)
    return checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


@pytest.fixture
def furnished(checkout: Path) -> Path:
    return furnish(checkout)


@pytest.fixture
def trainer(furnished: Path) -> Path:
    return make_trainer(furnished)


def site_packages(checkout: Path) -> Path:
    return next((checkout / ".venv" / "lib").glob("python*/site-packages"))


def run(
    script: Path, *arguments: str, cwd: Path | None = None, text: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        input=text,
        env=os.environ | {"PIP_NO_INDEX": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def set_up(checkout: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> tuple[int, str, str]:
    done = run(checkout / "scripts" / "environment.sh", *arguments, cwd=cwd, **environment)
    return done.returncode, done.stdout, done.stderr


def pip_calls(checkout: Path) -> list[list[str]]:
    calls = checkout / "pip_calls"
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_the_package_is_installed_editable_under_the_constraints(furnished: Path, tmp_path: Path) -> None:
    code, reported, complaint = set_up(furnished, cwd=tmp_path)
    assert (code, complaint) == (0, "")
    assert "GB" in reported
    [call] = pip_calls(furnished)
    assert call[0] == "install"
    assert call[-4:] == ["--constraint", "constraints.txt", "--editable", ".[wandb]"]


def test_a_second_call_does_nothing_in_under_a_second(furnished: Path) -> None:
    set_up(furnished)
    began = time.monotonic()
    assert set_up(furnished) == (0, "", "")
    assert time.monotonic() - began < 1
    assert len(pip_calls(furnished)) == 1


def test_dev_adds_what_tests_need_and_a_plain_call_accepts_it(furnished: Path) -> None:
    for arguments in ([], ["--dev"], [], ["--dev"]):
        assert set_up(furnished, *arguments)[0] == 0
    assert [call[-1] for call in pip_calls(furnished)] == [".[wandb]", ".[wandb,dev]"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed(name: str, furnished: Path) -> None:
    set_up(furnished)
    with (furnished / name).open("a") as file:
        file.write("# changed\n")
    set_up(furnished)
    assert len(pip_calls(furnished)) == 2


def test_a_failure_of_pip_keeps_its_code_and_is_retried(furnished: Path) -> None:
    code, _, complaint = set_up(furnished, PIP_EXIT="3")
    assert code == 3
    assert ".venv/install.log" in complaint
    assert set_up(furnished)[0] == 0
    assert len(pip_calls(furnished)) == 2


def test_a_killed_call_can_be_repeated(furnished: Path) -> None:
    killed = subprocess.Popen(
        [str(furnished / "scripts" / "environment.sh")],
        env=os.environ | {"PIP_SECONDS": "60"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: bool(pip_calls(furnished)))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert set_up(furnished)[0] == 0
    assert len(pip_calls(furnished)) == 2


def test_of_two_calls_at_once_one_installs_and_the_other_waits(furnished: Path) -> None:
    first = subprocess.Popen(
        [str(furnished / "scripts" / "environment.sh")],
        env=os.environ | {"PIP_SECONDS": "1"},
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: bool(pip_calls(furnished)))
    code, reported, _ = set_up(furnished)
    assert (first.wait(), code) == (0, 0)
    assert reported == "Waiting for another scripts/environment.sh to finish.\n"
    assert len(pip_calls(furnished)) == 1


def wait_for(happened: object) -> None:
    """Wait until `happened()`, two minutes at most: other programs may be running."""
    assert callable(happened)
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_unknown_option_is_refused(checkout: Path) -> None:
    code, _, complaint = set_up(checkout, "--devel")
    assert code == 2
    assert '"--devel"' in complaint
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("exit 1", "no Python 3.11 or newer"),
        (
            f"exec '{sys.executable}' -c 'import sys; sys.modules[\"ensurepip\"] = None; exec(sys.argv[1])' \"$2\"",
            "python3-venv",
        ),
    ],
)
def test_a_machine_without_a_usable_python_gets_one_line(
    program: str, what: str, checkout: Path, tmp_path: Path
) -> None:
    names = ("python", "python3", "python3.11", "python3.12", "python3.13")
    code, _, complaint = set_up(checkout, PATH=stand_in(tmp_path, names, program))
    assert (code, complaint.count("\n")) == (2, 1)
    assert what in complaint
    assert not (checkout / ".venv").exists()


def test_a_full_disk_is_found_before_anything_is_installed(furnished: Path, tmp_path: Path) -> None:
    program = "printf 'Filesystem 1024-blocks Used Available\\n/dev/x 9 9 100000\\n'"
    code, _, complaint = set_up(furnished, PATH=stand_in(tmp_path, ("df",), program))
    assert code == 6
    assert "100 MB are free" in complaint
    assert pip_calls(furnished) == []


def stand_in(folder: Path, names: tuple[str, ...], program: str) -> str:
    """A PATH on which another program stands before those of `names`."""
    (folder / "bin").mkdir()
    for name in names:
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / "bin" / name).chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


@pytest.mark.slow
def test_an_environment_whose_python_is_gone_is_made_anew_with_the_real_pip(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text(PROJECT + '[project]\nname = "tiny"\nversion = "1"\n')
    (checkout / "backend.py").write_text(BACKEND)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to("no-such-python")
    code, _, complaint = set_up(checkout)
    assert (code, complaint) == (0, "")
    assert (site_packages(checkout) / "tiny_was_installed.py").exists()
    assert set_up(checkout) == (0, "", "")


@pytest.mark.slow
def test_an_environment_without_pip_gets_one_and_keeps_its_packages(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text(PROJECT + '[project]\nname = "tiny"\nversion = "1"\n')
    (checkout / "backend.py").write_text(BACKEND)
    venv.create(checkout / ".venv", symlinks=True)
    (site_packages(checkout) / "somebody_elses.py").touch()
    code, _, complaint = set_up(checkout)
    assert (code, complaint) == (0, "")
    assert (site_packages(checkout) / "tiny_was_installed.py").exists()
    assert (site_packages(checkout) / "somebody_elses.py").exists()


@pytest.mark.slow
def test_run_tests_installs_the_tools_and_passes_its_arguments_to_pytest(furnished: Path, tmp_path: Path) -> None:
    borrow_packages(furnished)
    (furnished / "tests").mkdir()
    (furnished / "tests" / "test_it.py").write_text("def test_one(): pass\ndef test_two(): assert False\n")
    done = run(furnished / "run_tests.sh", "-n", "0", "-k", "one", cwd=tmp_path)
    assert done.returncode == 0
    assert "1 passed" in done.stdout and "failed" not in done.stdout
    assert pip_calls(furnished)[0][-1] == ".[wandb,dev]"
    assert run(furnished / "run_tests.sh").returncode == 1


def borrow_packages(checkout: Path) -> None:
    """Let the checkout's environment see the packages of this one; smollm2 itself is the checkout's own."""
    (site_packages(checkout) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))


SMALL = ("--input_file", "-", "--training.sample_tokens", "0", "--training.sequence_length", "16", "--skip_preflight")
TEXT = "".join(f"Line {number} of a text that a small model can learn.\n" for number in range(2000))


def steps(checkout: Path) -> list[int]:
    """The steps in metrics.jsonl that report a training loss."""
    path = checkout / "checkpoints" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A checkout whose run with the shipped config was stopped by a signal to the script, its exit code and output."""
    folder = make_trainer(furnish(make_checkout(tmp_path_factory.mktemp("interrupted"))))
    with (folder.parent / "output").open("w") as output, (folder.parent / "text").open("w+") as text:
        text.write(TEXT)
        text.seek(0)
        script = str(folder / "run_training.sh")
        process = subprocess.Popen([script, *SMALL, "--training.log_interval", "1"], stdin=text, stdout=output)
    wait_for(lambda: bool(steps(folder)))
    process.terminate()
    return folder, process.wait(timeout=60), (folder.parent / "output").read_text()


def test_a_signal_to_the_script_reaches_the_trainer(interrupted: tuple[Path, int, str]) -> None:
    folder, code, _ = interrupted
    assert code == 143
    assert list((folder / "checkpoints").glob("step_*.pt"))


def test_the_shipped_config_gives_way_to_nano(interrupted: tuple[Path, int, str]) -> None:
    folder, _, shown = interrupted
    assert "this run uses the small `nano` preset" in shown
    assert "num_hidden_layers: 4  # preset nano" in (folder / "checkpoints" / "config.yaml").read_text()


def test_a_run_reads_standard_input_resumes_and_prints_the_next_commands(
    interrupted: tuple[Path, int, str], tmp_path: Path
) -> None:
    folder = interrupted[0]
    last = steps(folder)[-1] + 1
    done = run(folder / "run_training.sh", *SMALL, "--train_steps", str(last), text=TEXT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run_tests.sh" in done.stdout
    assert (folder / "checkpoints" / f"step_{last:04d}.pt").exists()
    assert steps(folder) == list(range(1, last + 1))


NANO = (*SMALL, "--preset", "nano", "--training.log_interval", "1")


def test_two_processes_train_together_and_the_code_is_that_of_the_trainer(trainer: Path, tmp_path: Path) -> None:
    """The time is over after one step."""
    arguments, two = (*NANO, "--training.time_limit", "0.1s"), {"NUM_PROCESSES": "2", "PYTHONPATH": ""}
    done = run(trainer / "run_training.sh", *arguments, text=TEXT, cwd=tmp_path, **two)
    assert (done.returncode, done.stderr.count("training.time_limit was reached")) == (75, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "2 processes" in done.stdout
    assert steps(trainer) == [1]


@pytest.mark.slow
def test_two_processes_print_the_next_commands(trainer: Path, tmp_path: Path) -> None:
    arguments = (*NANO, "--train_steps", "2")
    done = run(trainer / "run_training.sh", *arguments, text=TEXT, cwd=tmp_path, NUM_PROCESSES="2", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "run_tests.sh" in done.stdout
    assert steps(trainer) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "reported"),
    [
        (("--no_such_flag",), 2, "--no_such_flag: unknown"),
        pytest.param(("--input_file", "absent.txt"), 3, "absent.txt: file not found", marks=pytest.mark.slow),
    ],
)
def test_the_code_of_several_processes_is_that_of_the_trainer(
    arguments: tuple[str, ...], code: int, reported: str, trainer: Path
) -> None:
    done = run(trainer / "run_training.sh", *arguments, NUM_PROCESSES="2")
    assert (done.returncode, done.stderr.count(reported)) == (code, 1)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_signal_to_the_script_stops_several_processes_with_its_code(trainer: Path) -> None:
    """Promise F3."""
    (trainer / "input.txt").write_text(TEXT)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = subprocess.Popen(
            [str(trainer / "run_training.sh"), "--preset", "nano", "--training.log_interval", "1"],
            env=os.environ | {"NUM_PROCESSES": "2"},
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda: bool(steps(trainer)))
        process.send_signal(number)
        assert process.wait(timeout=25) == 128 + number
        assert list((trainer / "checkpoints").glob("step_*.pt"))
        shutil.rmtree(trainer / "checkpoints")


@pytest.mark.parametrize(
    ("arguments", "edit", "code", "is_replaced"),
    [
        pytest.param(("--input_file", "absent.txt"), "", 3, True, marks=pytest.mark.slow),
        (("--no_such_flag",), "", 2, False),
        (("--no_such_flag", "--config", "config.yaml"), "", 2, False),
        (("--no_such_flag",), "# edited\n", 2, False),
    ],
)
def test_only_the_shipped_config_gives_way_to_nano_and_the_exit_code_is_the_trainers(
    arguments: tuple[str, ...], edit: str, code: int, is_replaced: bool, trainer: Path
) -> None:
    with (trainer / "config.yaml").open("a") as file:
        file.write(edit)
    done = run(trainer / "run_training.sh", *arguments)
    assert done.returncode == code
    assert ("this run uses the small `nano` preset" in done.stdout) == is_replaced
    assert "Next:" not in done.stdout
