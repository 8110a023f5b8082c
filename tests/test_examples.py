"""The examples run, and compute what the package computes."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, WORDS, metrics, tiny_config, write_tiny

from smollm2.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tokenizer", ["bytes", "auto"])
def test_the_plain_trainer_has_the_losses_of_train_on_the_same_seed(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import plain_training

    text = WORDS * 40 + "".join(sorted(WORDS))  # so that a tail is held out, and a tokenizer has something to learn
    write_tiny(tmp_path, text=text)
    flags = {"data__tokenizer": tokenizer, "model__vocab_size": 300, "training__max_grad_norm": 0.9}
    config = tiny_config(tmp_path, **flags)
    train(config)
    rows = metrics(tmp_path / "checkpoints")
    expected = [row["loss"] for row in rows if "loss" in row]
    assert len(expected) == 12
    assert any(float(str(row["grad_norm"])) > 0.9 for row in rows if "grad_norm" in row), "clipping takes part"
    assert plain_training.train(config, tmp_path / "input.txt") == pytest.approx(expected, rel=1e-6)


def test_the_plain_trainer_is_a_command(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    command = [sys.executable, str(ROOT / "examples" / "plain_training.py"), "--training.train_steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line[:8] for line in done.stdout.splitlines()] == ["step 1/2", "step 2/2"]
