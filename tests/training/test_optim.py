"""The learning rate as closed formulas, and who is decayed by which optimizer."""

import copy
import math
from typing import Any

import pytest
import torch
from twins import small_model

from smollm2.config.schema import TrainingConfig
from smollm2.training.optim import build_optimizers, learning_rate_at, load_optimizer_states, optimizer_states


def make_config(**keys: object) -> TrainingConfig:
    return TrainingConfig.model_validate(keys)


def formula(step: int, schedule: str) -> float:
    """The rate of update step + 1 with a peak of 1, a floor of 0.1, 10 updates of warmup and 100 in all, 20 of them decay."""
    if step < 10:
        return (step + 1) / 10
    if schedule == "cosine":
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90))
    if schedule == "linear":
        return 1 - 0.9 * (step - 10) / 90
    return 1 - 0.9 * max(0, step - 80) / 20


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_rate_is_the_closed_formula_at_every_step(schedule: str) -> None:
    config = make_config(
        train_steps=100, warmup_steps=10, schedule=schedule, learning_rate=1.0, min_learning_rate=0.1, decay_steps=20
    )
    for step in range(100):
        assert learning_rate_at(step, config) == pytest.approx(formula(step, schedule), rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_warmup_longer_than_the_run_ends_inside_it(schedule: str) -> None:
    config = make_config(train_steps=5, warmup_steps=100, schedule=schedule, learning_rate=1.0)
    assert [learning_rate_at(step, config) for step in range(5)] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_every_parameter_is_held_once_and_matrices_alone_decay(optimizer: str, norm: str) -> None:
    model = small_model(norm=norm, tie_word_embeddings=False)
    optimizers = build_optimizers(model, make_config(optimizer=optimizer, weight_decay=0.3))
    held = [(p, group) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert sorted(id(p) for p, _ in held) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == (0.3 if p.ndim == 2 else 0.0) for p, group in held)


def test_decay_all_reaches_norms_too() -> None:
    optimizers = build_optimizers(small_model(), TrainingConfig(decay="all", weight_decay=0.3))
    assert {group["weight_decay"] for group in optimizers["adamw"].param_groups} == {0.3}


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    model = small_model()
    optimizers = build_optimizers(model, TrainingConfig(optimizer="muon"))
    states: dict[str, Any] = optimizer_states(optimizers)
    names = states["muon"]["parameters"]
    assert len(names) == 3 * 7
    assert all(name.startswith("model.layers.") and "norm" not in name for name in names)


def test_a_loaded_state_keeps_the_rate_and_decay_of_the_config() -> None:
    model = small_model()
    saved = optimizer_states(build_optimizers(model, TrainingConfig(weight_decay=0.1)))
    optimizers = build_optimizers(model, TrainingConfig(weight_decay=0.5))
    load_optimizer_states(optimizers, saved)
    assert optimizers["adamw"].param_groups[0]["weight_decay"] == 0.5


def test_parameters_in_another_order_are_refused() -> None:
    saved: dict[str, Any] = optimizer_states(build_optimizers(small_model(), TrainingConfig()))
    saved["adamw"]["parameters"] = list(reversed(saved["adamw"]["parameters"]))
    with pytest.raises(ValueError, match="another order"):
        load_optimizer_states(build_optimizers(small_model(), TrainingConfig()), saved)


def test_moments_come_back_bit_for_bit() -> None:
    models = [small_model(), small_model()]
    optimizers = [build_optimizers(m, TrainingConfig(optimizer="muon")) for m in models]
    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))

    def move(which: int) -> None:
        models[which](ids, ids)[0].backward()
        for optimizer in optimizers[which].values():
            optimizer.step()
            optimizer.zero_grad()

    move(0)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_states(optimizers[1], copy.deepcopy(optimizer_states(optimizers[0])))
    move(0)
    move(1)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
