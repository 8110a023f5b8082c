"""Settings that are decided when a run starts."""

from pathlib import Path

import pytest
from runs import tiny_config, write_tiny

from smollm2.config.reading import load_config
from smollm2.errors import ConfigError
from smollm2.training import setup
from smollm2.training.loop import train

PROBLEM = "torch cannot compile here (no compiler)"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is long enough, and nothing is really compiled: that takes half a minute."""
    monkeypatch.setattr(setup, "is_compiled", lambda config, machine: True)
    monkeypatch.setattr(setup, "compiler_problem", lambda device: "")
    monkeypatch.setattr(setup, "compile_blocks", lambda layers: None)


def is_compiled(folder: Path) -> object:
    """Return what the run folder's config says."""
    return load_config(folder / "config.yaml").training.compile


def test_auto_is_settled_when_a_run_starts_and_kept_when_it_resumes(
    compiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    config = tiny_config(tmp_path, training__train_steps=2)
    assert config.training.compile == "auto"
    train(config)
    assert is_compiled(tmp_path / "checkpoints") is True
    monkeypatch.setattr(setup, "is_compiled", lambda config, machine: False)
    train(tiny_config(tmp_path, training__train_steps=4), resume="auto")
    assert is_compiled(tmp_path / "checkpoints") is True
    shown = capsys.readouterr().out
    assert "bit-exact" in shown and "training.compile" not in shown


def test_auto_does_without_a_compiler_and_reports_why(
    compiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    monkeypatch.setattr(setup, "compiler_problem", lambda device: PROBLEM)
    train(tiny_config(tmp_path, training__train_steps=1))
    assert is_compiled(tmp_path / "checkpoints") is False
    assert f"training.compile: auto -> false, because {PROBLEM}" in capsys.readouterr().out


def test_true_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    monkeypatch.setattr("smollm2.runtime.device.compiler_problem", lambda device: PROBLEM)
    with pytest.raises(ConfigError, match=r"training\.compile: torch cannot compile"):
        train(tiny_config(tmp_path, training__compile="true"))
