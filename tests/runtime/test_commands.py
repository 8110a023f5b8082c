"""Commands that work as they are printed."""

import subprocess
import sys
from pathlib import Path

import pytest

from smollm2.runtime.commands import CALLER, shown_path, shown_script, smollm2_command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an environment, as the current folder."""
    folder = tmp_path / "a checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, text in (("smollm2", "#!/bin/sh\necho generated\n"), ("python", "")):
        path = folder / ".venv" / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.delenv(CALLER, raising=False)
    return folder


def test_paths_are_relative_to_the_folder_of_the_user(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (shown_path(Path("checkpoints")), shown_script(Path("run_tests.sh"))) == ("checkpoints", "./run_tests.sh")
    monkeypatch.setenv(CALLER, str(project.parent))
    assert shown_path(Path("checkpoints")) == "'a checkout/checkpoints'"
    assert shown_script(Path("run_tests.sh")) == "'a checkout/run_tests.sh'"
    monkeypatch.setenv(CALLER, str(project / ".venv"))
    assert shown_path(Path("checkpoints")) == f"'{project}/checkpoints'"
    assert shown_path(Path("/data/run")) == "/data/run"


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize("folder", [".", "..", ".venv"])
def test_the_command_works_where_it_is_printed(project: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    caller = (project / folder).resolve()
    monkeypatch.setenv(CALLER, str(caller))
    command = smollm2_command(project / ".venv" / "bin" / "python")
    done = subprocess.run(["sh", "-c", f"{command} generate"], cwd=caller, capture_output=True, text=True)
    assert done.stdout == "generated\n", command


def test_an_activated_environment_is_called_by_its_name(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = project / ".venv" / "bin" / "python"
    assert smollm2_command(python) == ".venv/bin/smollm2"
    monkeypatch.setenv("PATH", f"{project / '.venv' / 'bin'}")
    assert smollm2_command(python) == "smollm2"


def test_an_environment_without_the_command_is_called_by_its_python(tmp_path: Path) -> None:
    assert smollm2_command(tmp_path / "python3") == f"{tmp_path}/python3 -m smollm2"
