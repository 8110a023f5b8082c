"""Muon against a plain float64 reference, and against itself: stacked or alone, tall or wide, saved and loaded."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from twins import small_model

from smollm2.config.schema import ModelConfig, TrainingConfig
from smollm2.plan.arithmetic import muon_flops
from smollm2.runtime.precision import muon_dtype
from smollm2.training import muon as muon_file
from smollm2.training.muon import COEFFICIENTS, Muon, orthogonalize
from smollm2.training.optim import (
    build_optimizers,
    describe_arithmetic_changes,
    load_optimizer_states,
    optimizer_states,
)

SHAPES = [(24, 24), (16, 40), (40, 16), (24, 24), (16, 40), (1, 8)]


def matrices(seed: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Tensor]:
    """Random matrices, well conditioned enough to be compared."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make_muon(weights: Sequence[Tensor], **options: object) -> tuple[list[nn.Parameter], Muon]:
    """Parameters with these values, and a Muon over them."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    named = [(f"w{number}", p) for number, p in enumerate(parameters)]
    return parameters, Muon(named, **{"lr": 0.01, **options})  # type: ignore[arg-type]


def step(parameters: Sequence[nn.Parameter], muon: Muon, gradients: Sequence[Tensor]) -> None:
    """One update from these gradients."""
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    muon.step()


def reference(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, weight_decay: float, momentum: float
) -> Tensor:
    """The rule as it is written in arXiv 2502.16982, one matrix in float64."""
    w, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in (g.double() for g in gradients):
        buffer = momentum * buffer + (1 - momentum) * gradient
        x = momentum * buffer + (1 - momentum) * gradient
        x = x / (x @ x.T).norm().sqrt()
        for a, b, c in COEFFICIENTS:
            x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
        w = (1 - lr * weight_decay) * w - lr * 0.2 * max(w.shape) ** 0.5 * x
    return w


def test_updates_equal_a_plain_float64_reference() -> None:
    weights, gradients = matrices(0), [matrices(seed) for seed in (1, 2, 3)]
    options = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9}
    parameters, muon = make_muon(weights, **options)
    for now in gradients:
        step(parameters, muon, now)
    for number, p in enumerate(parameters):
        expected = reference(weights[number], [now[number] for now in gradients], **options)
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-5)


def test_a_stack_equals_its_matrices_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (stacked, first), (alone, second) = make_muon(matrices(0)), make_muon(matrices(0))
    step(stacked, first, matrices(1))
    monkeypatch.setattr(muon_file, "STACKED_NUMBERS", 1)
    step(alone, second, matrices(1))
    for a, b in zip(stacked, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_tall_matrix_is_updated_as_the_transposed_wide_one() -> None:
    weight, gradient = matrices(0, [(16, 40)])[0], matrices(1, [(16, 40)])[0]
    (wide,), first = make_muon([weight])
    (tall,), second = make_muon([weight.T])
    step([wide], first, [gradient])
    step([tall], second, [gradient.T])
    torch.testing.assert_close(tall.T, wide, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (16, 40)])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.stack(matrices(0, [shape] * 3)).double()
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    spectrum = torch.logspace(-2, 0, 16, dtype=torch.float64)
    singular = torch.linalg.svdvals(orthogonalize((u * spectrum) @ v, dtype).double())
    assert singular.min() > 0.75
    assert singular.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_singular_and_tiny_and_huge_gradients_give_finite_updates(scale: float, dtype: torch.dtype) -> None:
    one_direction = scale * torch.outer(torch.arange(1.0, 17), torch.arange(1.0, 41))
    gradients = [one_direction, one_direction.T, one_direction[:, :16], torch.zeros(16, 40)]
    weights = [torch.zeros_like(g) for g in gradients]
    parameters, muon = make_muon(weights, dtype=dtype)
    for _ in range(2):
        step(parameters, muon, gradients)
    assert all(p.isfinite().all() and p.abs().max() < 1 for p in parameters)
    assert not parameters[-1].any()


def test_bf16_gives_nearly_the_update_of_float32() -> None:
    x = torch.stack(matrices(0, [(16, 40)] * 4))
    exact, rounded = orthogonalize(x, torch.float32), orthogonalize(x, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (exact - rounded.float()).norm() / exact.norm() < 0.06


def test_weights_decay_by_rate_times_decay_and_no_further() -> None:
    (weight,), muon = make_muon([torch.ones(4, 6)], lr=0.1, weight_decay=0.5)
    step([weight], muon, [torch.zeros(4, 6)])
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), 0.95))


def test_a_parameter_without_a_gradient_stays() -> None:
    parameters, muon = make_muon(matrices(0)[:2])
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones(24, 24)
    muon.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in muon.state


def test_what_is_no_matrix_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"w0 has the shape \(3,\)"):
        make_muon([torch.zeros(3)])


def test_a_saved_state_continues_bit_for_bit() -> None:
    parameters, muon = make_muon(matrices(0))
    step(parameters, muon, matrices(1))
    others, loaded = make_muon([p.detach() for p in parameters])
    loaded.load_state_dict(copy.deepcopy(muon.state_dict()))
    for seed in (2, 3):
        step(parameters, muon, matrices(seed))
        step(others, loaded, matrices(seed))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def old_states(
    parameters: list[tuple[str, Tensor]], states: dict[str, dict[str, object]]
) -> dict[str, dict[str, object]]:
    """The states as they were saved when the optimizer was torch's."""
    theirs = torch.optim.Muon(parameters, lr=0.01)
    for _, p in parameters:
        p.grad = torch.ones_like(p)
    theirs.step()  # type: ignore[no-untyped-call]
    return {**states, "muon": {"parameters": [name for name, _ in parameters], "state": theirs.state_dict()}}


def test_a_state_of_torchs_muon_is_loaded_and_the_change_named() -> None:
    model = small_model()
    optimizers = build_optimizers(model, TrainingConfig(optimizer="muon"))
    group = optimizers["muon"].param_groups[0]
    named = list(zip(group["param_names"], group["params"], strict=True))
    states = old_states(named, optimizer_states(optimizers))
    load_optimizer_states(optimizers, states)
    buffer = optimizers["muon"].state[named[0][1]]["momentum_buffer"]
    torch.testing.assert_close(buffer, torch.full_like(buffer, 0.05))
    changes = describe_arithmetic_changes(optimizers, states)
    assert changes == ["the optimizer's arithmetic (muon, version 1 -> 2)"]


def test_states_of_this_version_name_no_change() -> None:
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(small_model(), TrainingConfig(optimizer=name))
        assert describe_arithmetic_changes(optimizers, optimizer_states(optimizers)) == []


def test_products_are_in_bf16_only_on_a_device_that_computes_it() -> None:
    assert muon_dtype(frozenset({"bf16", "tf32"})) == torch.bfloat16
    assert muon_dtype(frozenset()) == torch.float32


@pytest.mark.parametrize(("device", "dtype"), [("cpu-avx2", torch.float32), ("cpu-bf16", torch.bfloat16)])
def test_the_planned_arithmetic_is_what_a_step_computes(device: str, dtype: torch.dtype) -> None:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    hidden, key_value, inner = (32, 32), (16, 32), (80, 32)
    shapes = [hidden, hidden, key_value, key_value, inner, inner, inner[::-1]] * 2
    parameters, muon = make_muon([torch.zeros(shape) for shape in shapes], dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        step(parameters, muon, matrices(0, shapes))
    assert counter.get_total_flops() == muon_flops(config, device)
