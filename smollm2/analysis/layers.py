"""The first layer at which two models with the same weights differ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smollm2.analysis.foreign import logits_of
from smollm2.analysis.probe import evaluating, largest

SAME = 1e-4
"""The largest difference of two outputs, relative to the largest value, that rounding of float32 explains."""


@dataclass(frozen=True)
class Divergence:
    """The first place at which two models differ, and the places that agreed before it."""

    place: str
    difference: float
    agreed: int
    logits: float


def compare_layers(first: nn.Module, second: nn.Module, ids: Tensor) -> Divergence:
    """Return where two models, run on the same ids (B, T), first differ; `place` is empty if nowhere.

    Submodules are matched by name if the names agree after their prefixes are cut, else by the order of outputs that have
    the same shape. Differences are relative to the largest value.
    """
    ours, theirs = record(first, ids), record(second, ids)
    logits = relative(ours.pop(""), theirs.pop(""))
    pairs = list(match(ours, theirs))
    for agreed, (name, one, other) in enumerate(pairs):
        if not (found := relative(one, other)) <= SAME:
            return Divergence(name, found, agreed, logits)
    return Divergence("the logits" if not logits <= SAME else "", logits, len(pairs), logits)


def record(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the output (B, T, ...) of every submodule in order of completion; the logits are under the empty name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.ndim > 2 and first.shape[:2] == ids.shape:
            found.setdefault(name, first.detach().float())

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(ids)).float()
    finally:
        for handle in handles:
            handle.remove()
    found[""] = logits
    return found


def match(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Yield (name, output, output) of the submodules that belong together, in the order of ours."""
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    if len(shared) * 2 >= min(len(ours), len(theirs)):
        yield from ((name, ours[name], theirs[name]) for name in shared)
        return
    wide = [[(n, x) for n, x in side.items() if not list_children(n, side)] for side in (ours, theirs)]
    for (name, one), (other_name, other) in zip(*wide, strict=False):
        if one.shape != other.shape:
            return
        yield f"{name} (there {other_name})", one, other


def list_children(name: str, names: Iterable[str]) -> list[str]:
    """Return the submodules inside `name`."""
    return [one for one in names if one.startswith(f"{name}.")]


def relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return largest(one - other) / max(largest(other), 1e-30)
