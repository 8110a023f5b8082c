"""The model shared out (FSDP2) and checkpoints as folders on GPUs: on one with a world of 1, on two if there are two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_trials import differences, forget_the_end
from runs import outcome, tiny_config, write_tiny

from smollm2.cli.main import main
from smollm2.training.loop import train

SHARED = {"training__sharding": "full", "training__checkpoints": "folder", "training__deterministic": True}


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_a_model_in_one_part_has_the_losses_of_a_whole_one(
    device: torch.device, precision: str, bound: float, tmp_path: Path
) -> None:
    if device.type == "cpu" and precision != "float32":
        pytest.skip("16 bits are for GPUs here")
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, "whole", training__precision=precision))
    train(tiny_config(tmp_path, "shared", training__precision=precision, **SHARED))
    assert max(differences(tmp_path / "shared", tmp_path / "whole")) <= bound


def test_a_folder_resumes_bit_identically(device: torch.device, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, "run", **SHARED))
    expected = outcome(tmp_path / "run", 12)
    forget_the_end(tmp_path / "run")
    train(tiny_config(tmp_path, "run", **SHARED), resume="auto")
    assert outcome(tmp_path / "run", 12) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_gpus_have_the_losses_of_one(sharding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--config", "config.yaml", "--disable_wandb", "--save_dir"]
    assert main([*words, "one"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "smollm2"]
    subprocess.run([*launcher, *words, "two", "--training.sharding", sharding], check=True, timeout=300)
    assert max(differences(tmp_path / "two", tmp_path / "one")) <= 1e-4
