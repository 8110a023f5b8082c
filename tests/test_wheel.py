"""The wheel alone: installed without the checkout, run in an empty folder, it makes its sample corpus and trains."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bare_environment(folder: Path) -> Path:
    """An environment without this package, whose dependencies are those of the tests' own; returns its scripts folder.

    Installing torch anew would take minutes and a network. The link leads to the dependencies, not through them: the
    editable install of the checkout is a .pth file, and such a file counts only in a site folder itself.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.rglob("site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / ("Scripts" if sys.platform == "win32" else "bin")


@pytest.mark.slow
def test_the_wheel_alone_trains_on_the_sample_corpus_in_an_empty_folder(tmp_path: Path) -> None:
    def call(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path / "empty",
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "empty").mkdir()
    pip = [sys.executable, "-m", "pip"]
    call(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path / "dist")
    scripts = bare_environment(tmp_path / "bare")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    python = scripts / "python"
    call(*pip, "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", "--quiet", wheel)
    where = call(python, "-c", "import smollm2; print(smollm2.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "bare")
    call(scripts / "smollm2", "train", "--preset", "nano", "--train_steps", "5")
    assert (tmp_path / "empty" / "checkpoints" / "step_0005.pt").exists()
    assert (tmp_path / "empty" / "checkpoints" / "report.html").exists()
    assert (tmp_path / "empty" / "input.txt").stat().st_size > 10**6
