"""Run folders that the tests of the report share."""

import shutil
from pathlib import Path

import pytest
from run_folders import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything in it."""
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))
