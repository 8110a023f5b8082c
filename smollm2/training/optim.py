"""The optimizers (AdamW, or Muon for the matrices of the transformer blocks) and the learning rate schedule.

There is no scheduler object: the learning rate depends only on the step number, so a resume or a second device cannot
shift it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smollm2.config.schema import TrainingConfig
from smollm2.runtime.precision import device_features, muon_dtype
from smollm2.runtime.sharding import ALONE, Layout, lay_out_like
from smollm2.training.muon import Muon


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of the update that follows `step` completed ones (0 <= step < train_steps).

    Warmup: learning_rate * (step + 1) / warmup_steps. Then, with p the completed fraction of the remaining updates,
    cosine: min + (max - min) (1 + cos(pi p)) / 2; linear: max - (max - min) p; wsd: max, then linear over the last
    decay_steps (SmolLM2's recipe, arXiv 2502.02737, section 4).
    """
    highest, lowest = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return highest * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.train_steps - config.decay_steps)
    done = min(1.0, max(0, step - start) / max(1, config.train_steps - start))
    if config.schedule == "cosine":
        return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * done))
    return highest - (highest - lowest) * done


def build_optimizers(model: nn.Module, config: TrainingConfig, layout: Layout = ALONE) -> dict[str, Optimizer]:
    """Return the optimizers by name; each trainable parameter belongs to exactly one of them.

    With `decay: matrices`, parameters with one dimension (norms and biases) have no weight decay. Muon updates the
    matrices of the blocks; its update is scaled so that AdamW's learning rate and weight decay suit both (arXiv
    2502.16982).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {n: p for n, p in parameters.items() if config.optimizer == "muon" and p.ndim == 2 and ".layers." in n}
    groups = _decay_groups({n: p for n, p in parameters.items() if n not in muon}, config)
    device = next(iter(parameters.values())).device
    optimizers: dict[str, Optimizer] = {
        "adamw": torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=device.type in ("cpu", "cuda")
        )
    }
    if muon:
        optimizers["muon"] = Muon(
            list(muon.items()),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.betas[0],
            dtype=muon_dtype(device_features(device)),
            layout=layout,
        )
    return optimizers


def _decay_groups(parameters: Mapping[str, Tensor], config: TrainingConfig) -> list[dict[str, object]]:
    decayed = {n: p for n, p in parameters.items() if config.decay == "all" or p.ndim >= 2}
    others = {n: p for n, p in parameters.items() if n not in decayed}
    split = ((decayed, config.weight_decay), (others, 0.0))
    return [{"params": list(group.items()), "weight_decay": decay} for group, decay in split if group]


def set_learning_rate(optimizers: Mapping[str, Optimizer], rate: float) -> None:
    """Set the same learning rate in every parameter group of every optimizer."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate


def optimizer_states(optimizers: Mapping[str, Optimizer]) -> dict[str, dict[str, object]]:
    """Return what a checkpoint stores for each optimizer: its state, its parameter names and its update rule's version.

    The names reveal a change in the order of the parameters. The version is stored only if it is not 1.
    """
    states: dict[str, dict[str, object]] = {}
    for name, optimizer in optimizers.items():
        states[name] = {"parameters": _names(optimizer), "state": optimizer.state_dict()}
        if (version := arithmetic_of(optimizer)) != 1:
            states[name]["arithmetic"] = version
    return states


def arithmetic_of(optimizer: Optimizer) -> int:
    """Return the version of the optimizer's update rule: 1 for torch's own optimizers."""
    return int(getattr(optimizer, "arithmetic", 1))


def describe_arithmetic_changes(
    optimizers: Mapping[str, Optimizer], states: Mapping[str, Mapping[str, object]]
) -> list[str]:
    """Return a phrase for each optimizer whose update rule has changed since these states were saved."""
    versions = {name: (states[name].get("arithmetic", 1), arithmetic_of(o)) for name, o in optimizers.items()}
    return [
        f"the optimizer's arithmetic ({n}, version {old} -> {new})" for n, (old, new) in versions.items() if old != new
    ]


def load_optimizer_states(optimizers: Mapping[str, Optimizer], states: Mapping[str, Mapping[str, object]]) -> None:
    """Restore the moments. Learning rate, weight decay and betas keep the config's values, which a resume may change.

    Raise ValueError if the optimizers or the order of their parameters differ.
    """
    if {name: _names(o) for name, o in optimizers.items()} != {n: list(s["parameters"]) for n, s in states.items()}:  # type: ignore[call-overload]
        raise ValueError("the optimizer's parameters are different, or are in another order")
    for name, optimizer in optimizers.items():
        found: Any = states[name]["state"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            index: {
                key: lay_out_like(value, parameters[index]) if value.shape == parameters[index].shape else value
                for key, value in one.items()
            }
            for index, one in found["state"].items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**found, "state": moments, "param_groups": groups})


def _names(optimizer: Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]
