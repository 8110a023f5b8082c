"""Checkpoints that earlier versions wrote: tests/golden/, made by tests/golden/make.py with each version's own code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_outcome import describe_cpu, digest, tensors_of

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import State
from smollm2.config.reading import load_config
from smollm2.training.loop import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
pytestmark = pytest.mark.usefixtures("one_thread")

VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if (path / "outcome.json").exists())
REDUCED_ACCURACY = 1e-5
"""Largest difference of a weight, moment or loss where another kind of CPU, thread count or torch adds in another order.
Measured 1.2e-7 between AVX2 and ATEN_CPU_CAPABILITY=default (2026-11-25)."""


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def resume(version: Path, optimizer: str, tmp_path: Path) -> Path:
    """Resume the golden checkpoint of `optimizer` to its last step as a user does; return the run folder."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(version / f"{optimizer}_step_0004.pt", folder / "step_0004.pt")
    flags = {
        "data.input": str(GOLDEN / "input.txt"),
        "data.cache_dir": str(tmp_path / "cache"),
        "training.save_dir": str(folder),
        "training.optimizer": optimizer,
    }
    train(load_config(GOLDEN / "config.yaml", flags={k: (f"--{k}", v) for k, v in flags.items()}), resume="auto")
    return folder


def recorded_outcome(version: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((version / "outcome.json").read_text(encoding="utf-8"))
    return found


def same_machine(recorded: dict[str, Any]) -> bool:
    """Whether this machine adds in the order of the recorded one, so that results must be bit-identical."""
    here = {"cpu": describe_cpu(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    return here == {name: recorded[name] for name in here}


def test_each_golden_checkpoint_is_small_enough_for_the_repository(version: Path) -> None:
    assert all(path.stat().st_size < 300_000 for path in version.glob("*.pt"))


def test_a_golden_checkpoint_is_read_with_the_weights_and_moments_it_was_written_with(version: Path) -> None:
    assert digest(load_checkpoint(version / "adamw_step_0008.pt")) == recorded_outcome(version)["sha256"]


def test_a_golden_checkpoint_of_adamw_resumes_to_the_end_of_its_own_version(version: Path, tmp_path: Path) -> None:
    """B3. Bit-exact on the kind of CPU on which the checkpoint was made; elsewhere products add in another order, and the
    comparison is to within REDUCED_ACCURACY."""
    recorded = recorded_outcome(version)
    folder = resume(version, "adamw", tmp_path)
    state: State = load_checkpoint(folder / "step_0008.pt")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    expected = tensors_of(load_checkpoint(version / "adamw_step_0008.pt"))
    found = tensors_of(state)
    assert found.keys() == expected.keys()
    if same_machine(recorded):
        assert losses == recorded["losses"][4:]
        assert digest(state) == recorded["sha256"]
    else:
        assert losses == pytest.approx(recorded["losses"][4:], abs=REDUCED_ACCURACY)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=REDUCED_ACCURACY, msg=name)


def test_a_golden_checkpoint_of_muon_resumes_and_one_line_reports_that_its_arithmetic_changed(
    version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B3. The momentum of torch.optim.Muon is of use to the Muon that replaced it, which orthogonalizes otherwise."""
    folder = resume(version, "muon", tmp_path)
    assert load_checkpoint(folder / "step_0008.pt")["step"] == 8
    lines = [line for line in capsys.readouterr().out.splitlines() if "arithmetic" in line]
    assert len(lines) == 1, lines
