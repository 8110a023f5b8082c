"""The checks before a run and the autopsy of a spike, on a GPU: no alarm for a sound run, and the fault by its name."""

from pathlib import Path

import pytest
import torch
from preparing import prepare_run
from runs import write_tiny
from spikes import SPIKE, config_of, event_of, write_text

from smollm2.analysis.checks import describe_result
from smollm2.cli.main import main
from smollm2.training.loop import train
from smollm2.training.preflight import check_run


@pytest.mark.parametrize("compiles", ["false", "true"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
def test_no_check_of_a_sound_run_warns_or_fails(
    device: torch.device, precision: str, compiles: str, tmp_path: Path
) -> None:
    if device.type == "cpu" and (precision != "float32" or compiles == "true"):
        pytest.skip("16 bits and compiled steps are for GPUs here")
    write_tiny(tmp_path)
    flags = {"training.precision": precision, "training.compile": compiles, "model.tie_word_embeddings": "false"}
    results = check_run(prepare_run(tmp_path, flags).run, deep=True)
    assert [describe_result(one) for one in results if one.verdict in ("warn", "fail")] == []


def test_a_batch_of_garbage_is_named_and_replayed_bit_for_bit(device: torch.device, tmp_path: Path) -> None:
    write_text(tmp_path, with_garbage=True)
    train(config_of(tmp_path, training__deterministic=True))
    assert event_of(tmp_path, SPIKE)["cause"] == "data"
    assert main(["replay", str(tmp_path / "checkpoints/events" / f"step_{SPIKE:04d}")]) == 0  # 5 if a bit differs
