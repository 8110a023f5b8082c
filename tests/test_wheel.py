"""The wheel in an empty environment: installed with its dependencies, run in an empty folder, it trains and writes."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Removed at the end: the environment takes 1.3 GB, and pytest keeps the folders of three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_trains_on_the_sample_corpus_in_an_empty_folder(folder: Path) -> None:
    """The dependencies come from the index that pip is configured for."""
    (folder / "empty").mkdir()
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}

    def call(*command: object, **more: str) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder / "empty",
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **more},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip"]
    call(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder / "dist")
    venv.create(folder / "bare", with_pip=False, symlinks=True)
    scripts = folder / "bare" / ("Scripts" if sys.platform == "win32" else "bin")
    (wheel,) = (folder / "dist").glob("*.whl")
    home = {"HOME": str(Path.home()), **kept}  # where pip keeps its settings, and what it fetched before
    constraints = ["-c", ROOT / "constraints.txt"]
    call(*pip, "--python", scripts / "python", "install", "--quiet", *constraints, wheel, **home)
    where = call(scripts / "python", "-c", "import smollm2, torch; print(smollm2.__file__); print(torch.__file__)")
    assert all(Path(line).is_relative_to(folder / "bare") for line in where.splitlines())
    call(scripts / "smollm2", "train", "--preset", "nano", "--train_steps", "5")
    assert (folder / "empty" / "checkpoints" / "step_0005.pt").exists()
    assert (folder / "empty" / "input.txt").stat().st_size > 10**6
    text = call(scripts / "smollm2", "generate", "checkpoints", "--prompt", "The", "--max_new_tokens", "8")
    assert text.startswith("The") and len(text) > 4
