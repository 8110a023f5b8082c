"""Whole steps and runs on a GPU: compilation, activation checkpointing, resuming, snapshots, running out of memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import loss_and_gradient, make_batch, make_config, start
from runs import outcome, tiny_config, write_tiny

from smollm2.checkpoint.format import content_hash, take_snapshot
from smollm2.config.schema import TrainingConfig
from smollm2.model.transformer import SmolLM2
from smollm2.training.loop import train
from smollm2.training.optim import build_optimizers, optimizer_states
from smollm2.training.setup import build_model
from smollm2.training.step import train_step

DETERMINISTIC: dict[str, Any] = (
    {"training__deterministic": True} if "deterministic" in TrainingConfig.model_fields else {}
)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_compiled_blocks_have_the_gradient_of_eager_ones(device: torch.device, checkpointing: bool) -> None:
    batch = make_batch(device)
    expected_loss, expected = loss_and_gradient(make_config(), batch)
    torch._dynamo.reset()
    loss, gradient = loss_and_gradient(make_config(compile=True, gradient_checkpointing=checkpointing), batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_activation_checkpointing_takes_less_memory_and_has_the_same_gradient(gpu: torch.device) -> None:
    batch = make_batch(gpu, rows=64)
    found, peaks = [], []
    for checkpointing in (False, True):
        torch.cuda.reset_peak_memory_stats()
        found.append(loss_and_gradient(make_config(gradient_checkpointing=checkpointing), batch))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
    assert (found[1][1] - found[0][1]).norm() <= 1e-5 * found[0][1].norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_resumed_run_is_bit_identical(device: torch.device, tmp_path: Path, precision: str, optimizer: str) -> None:
    if device.type == "cpu" and precision != "float32":
        pytest.skip("16 bits are for GPUs here; tests/training has the CPU's")
    flags = {"training__precision": precision, "training__optimizer": optimizer, **DETERMINISTIC}
    write_tiny(tmp_path / "whole")
    train(tiny_config(tmp_path / "whole", **flags))
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", folder)
    for step in (8, 12):
        (folder / "checkpoints" / f"step_{step:04d}.pt").unlink()
    train(tiny_config(folder, **flags), resume="auto")
    assert outcome(folder / "checkpoints", 12) == outcome(tmp_path / "whole" / "checkpoints", 12)


def test_a_snapshot_keeps_the_state_of_its_step_while_training_continues(device: torch.device) -> None:
    config = make_config()
    runtime = start(config)
    model, batch = build_model(config, runtime), make_batch(device)
    optimizers = build_optimizers(model, config.training)

    def step() -> None:
        train_step(model, optimizers, [batch], runtime, learning_rate=1e-2, max_grad_norm=1.0)

    step()
    state = {"model": model.state_dict(), "optimizer": optimizer_states(optimizers)}
    expected = content_hash({"optimizer": state["optimizer"]})
    buffers: dict[str, torch.Tensor] = {}
    snapshot = take_snapshot(state, buffers)
    step()
    assert content_hash({"optimizer": snapshot["optimizer"]}) == expected
    assert content_hash({"optimizer": optimizer_states(optimizers)}) != expected
    assert all(buffer.is_pinned() == (device.type == "cuda") for buffer in buffers.values())


def test_a_batch_that_does_not_fit_is_cut_and_the_run_is_that_of_the_smaller_size(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10, with a model that pretends: exactly as many sequences fit as the test says."""
    write_tiny(tmp_path / "small")
    train(tiny_config(tmp_path / "small", training__batch_size=2, training__gradient_accumulation_steps=4))
    forward = SmolLM2.forward

    def cramped(self: SmolLM2, input_ids: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if len(input_ids) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids, *arguments, **named)

    monkeypatch.setattr(SmolLM2, "forward", cramped)
    write_tiny(tmp_path / "large")
    train(tiny_config(tmp_path / "large", training__batch_size=8, training__gradient_accumulation_steps=1))
    large, small = (outcome(tmp_path / name / "checkpoints", 12)[0] for name in ("large", "small"))
    assert large == small
    events = [json.loads(line) for line in (tmp_path / "large/checkpoints/events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "out_of_memory" for event in events) == 2


def test_a_gpu_that_is_really_full_shrinks_the_micro_batch(gpu: torch.device, tmp_path: Path) -> None:
    """C10, with the allocator's own error: the process may take 600 MB."""
    total = torch.cuda.get_device_properties(gpu).total_memory
    write_tiny(tmp_path)
    flags = {
        "training__train_steps": 2,
        "training__batch_size": 4096,
        "training__gradient_accumulation_steps": 1,
        "model__hidden_size": 256,
        "model__intermediate_size": 1024,
    }
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(600e6 / total)
    try:
        train(tiny_config(tmp_path, **flags))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    lines = (tmp_path / "checkpoints" / "events.jsonl").read_text().splitlines()
    assert any(json.loads(line)["kind"] == "out_of_memory" for line in lines)


def test_tf32_is_off_again_after_a_run_that_used_it(gpu: torch.device, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(gpu)[0] < 8:
        pytest.skip("this GPU has no tf32")
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__precision="tf32", training__train_steps=2))
    assert torch.get_float32_matmul_precision() == "highest"
