"""The number formats on a GPU: the table, what each costs in accuracy, and fp16's loss scale."""

import math

import pytest
import torch
from gpu_runs import has_feature, loss_and_gradient, make_batch, make_config, start

from smollm2.runtime.precision import choose_precision, device_features
from smollm2.training.optim import build_optimizers
from smollm2.training.setup import build_model
from smollm2.training.step import train_step

GRADIENT_ERROR = {"tf32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Largest norm of the difference to the float32 gradient, as a share of that gradient's norm."""


def test_the_table_of_formats_takes_bf16_where_the_gpu_has_it_and_fp16_elsewhere(gpu: torch.device) -> None:
    capability = torch.cuda.get_device_capability(gpu)[0]
    features = device_features(gpu)
    assert features == ({"bf16", "tf32"} if capability >= 8 else set())
    assert choose_precision("auto", "cuda", features).name == ("bf16" if capability >= 8 else "fp16")


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_format_gives_the_gradient_of_float32_to_its_accuracy(device: torch.device, precision: str) -> None:
    if precision == "tf32" and not has_feature(device, "tf32"):
        pytest.skip("this device has no tf32")
    batch = make_batch(device)
    expected_loss, expected = loss_and_gradient(make_config(), batch)
    loss, gradient = loss_and_gradient(make_config(precision=precision), batch)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert (gradient - expected).norm() <= GRADIENT_ERROR[precision] * expected.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
def test_a_run_in_each_format_with_each_optimizer_learns(device: torch.device, precision: str, optimizer: str) -> None:
    if precision == "tf32" and not has_feature(device, "tf32"):
        pytest.skip("this device has no tf32")
    config = make_config(precision=precision, optimizer=optimizer)
    runtime = start(config)
    model, batch = build_model(config, runtime), make_batch(device)
    optimizers = build_optimizers(model, config.training)
    steps = 30 if device.type == "cuda" else 8  # 16 bits are emulated in a rehearsal
    results = [
        train_step(model, optimizers, [batch], runtime, learning_rate=1e-2, max_grad_norm=1.0) for _ in range(steps)
    ]
    losses = [result.loss for result in results if not result.skipped]
    assert len(losses) > steps / 2, "fp16 skips the first steps, until its scale fits"
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_fp16_moves_no_weight_and_halves_the_scale(device: torch.device, optimizer: str) -> None:
    config = make_config(precision="fp16", optimizer=optimizer)
    runtime = start(config)
    model, batch = build_model(config, runtime), make_batch(device)
    optimizers = build_optimizers(model, config.training)
    scaler = runtime.scaler
    state = scaler.state_dict()
    scaler.load_state_dict({**state, "scale": 2.0**40})
    before = [p.detach().clone() for p in model.parameters()]
    result = train_step(model, optimizers, [batch], runtime, learning_rate=1e-2, max_grad_norm=1.0)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**39
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0})
    assert not train_step(model, optimizers, [batch], runtime, learning_rate=1e-2, max_grad_norm=1.0).skipped
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
