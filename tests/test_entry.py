"""train.py: the user's command, from any Python and any folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with train.py and the package in it, and no .venv."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "smollm2", folder / "smollm2", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "train.py", folder)
    return folder


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python that has nothing but its standard library."""
    return make_python(tmp_path / "bare")


def make_python(folder: Path) -> Path:
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def give_dependencies(environment: Path) -> None:
    """Let an environment see what this one has, our own package apart: that lies beside train.py."""
    site_packages = next((environment / "lib").glob("python*/site-packages"))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))


def run(python: Path | str, script: Path, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_it_parses_on_an_old_python_3() -> None:
    ast.parse((ROOT / "train.py").read_text(encoding="ascii"), feature_version=(3, 4))


def test_it_checks_every_dependency_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in declared}
    source = ast.parse((ROOT / "train.py").read_text())
    listed = next(
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEPENDENCIES"
    )
    assert set(listed) == names - {"pyyaml"} | {"yaml"}


def test_it_is_the_command_smollm2_train(tmp_path: Path) -> None:
    ours = run(sys.executable, ROOT / "train.py", "--help", cwd=tmp_path)
    command = subprocess.run([sys.executable, "-m", "smollm2", "train", "--help"], capture_output=True, text=True)
    assert ours == (0, command.stdout, "")
    assert "--checkpoint_path" in command.stdout


def test_its_exit_code_is_the_trainers(tmp_path: Path) -> None:
    code, _, reported = run(sys.executable, ROOT / "train.py", "--no_such_flag", cwd=tmp_path)
    assert code == 2
    assert "--no_such_flag" in reported


def test_a_python_without_the_dependencies_starts_the_one_of_the_environment(
    checkout: Path, bare_python: Path, tmp_path: Path
) -> None:
    make_python(checkout / ".venv")
    give_dependencies(checkout / ".venv")
    code, shown, reported = run(bare_python, checkout / "train.py", "--help", cwd=tmp_path)
    assert (code, reported) == (0, "")
    assert "--checkpoint_path" in shown


def test_without_an_environment_one_line_names_the_script_to_run(
    checkout: Path, bare_python: Path, tmp_path: Path
) -> None:
    code, shown, reported = run(bare_python, checkout / "train.py", cwd=tmp_path)
    assert (code, shown) == (2, "")
    assert reported.count("\n") == 1
    assert f"Run {checkout / 'scripts' / 'environment.sh'} once." in reported


def test_an_environment_that_lacks_the_dependencies_is_tried_once(
    checkout: Path, bare_python: Path, tmp_path: Path
) -> None:
    make_python(checkout / ".venv")
    code, _, reported = run(bare_python, checkout / "train.py", cwd=tmp_path)
    assert code == 2
    assert reported.count("scripts/environment.sh") == 1


def test_a_python_that_is_too_old_is_reported(checkout: Path, tmp_path: Path) -> None:
    code, _, reported = run(find_old_python(), checkout / "train.py", cwd=tmp_path)
    assert (code, reported.count("\n")) == (2, 1)
    assert "older than 3.11" in reported


def find_old_python() -> str:
    """A Python below 3.11; a name on the PATH may be a launcher with none behind it. Skips where there is none."""
    for minor in range(10, 5, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    pytest.skip("no Python from 3.6 to 3.10 is on this machine")
