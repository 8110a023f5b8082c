"""The names and groups under which mirrors show numbers, and what they draw of a look inside the model.

Parameters have Hugging Face's names; a layer is what these have in common: `layers.3` for all of block 3, else
`embed_tokens`, `norm` or `lm_head`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smollm2.tracking.base import Diagnosis


@dataclass(frozen=True)
class Flow:
    """What passes through a layer in one update: norms of gradient and weights, and how far it moved over the latter."""

    gradient_norm: float
    weight_norm: float
    update_ratio: float


def group_metrics(metrics: Mapping[str, float | int]) -> dict[str, float | int]:
    """`validation_loss` becomes `validation/loss`, `loss` becomes `train/loss`: mirrors draw one section per group."""
    return {
        f"validation/{name.removeprefix('validation_')}" if name.startswith("validation_") else f"train/{name}": value
        for name, value in metrics.items()
    }


def layer_of(parameter: str) -> str:
    """`layers.3` for `model.layers.3.mlp.up_proj.weight`, `embed_tokens` for `model.embed_tokens.weight`."""
    block = re.search(r"layers\.\d+", parameter)
    return block[0] if block else parameter.removeprefix("model.").partition(".")[0]


def flow_by_layer(diagnosis: Diagnosis) -> dict[str, Flow]:
    """The parameters of each layer taken together, in the model's order."""
    members: dict[str, list[str]] = {}
    for parameter in diagnosis.gradient_norms:
        members.setdefault(layer_of(parameter), []).append(parameter)
    flows = {}
    for layer, names in members.items():
        weight = math.hypot(*(diagnosis.weight_norms[name] for name in names))
        moved = math.hypot(*(diagnosis.update_ratios[name] * diagnosis.weight_norms[name] for name in names))
        gradient = math.hypot(*(diagnosis.gradient_norms[name] for name in names))
        flows[layer] = Flow(gradient, weight, moved / weight if weight else 0.0)
    return flows


def diagnosis_metrics(diagnosis: Diagnosis) -> dict[str, float]:
    """The numbers of a look, by layer and block."""
    found = {"gradients/clipped": diagnosis.clipped}
    for layer, flow in flow_by_layer(diagnosis).items():
        found[f"gradients/norm/{layer}"] = flow.gradient_norm
        found[f"parameters/norm/{layer}"] = flow.weight_norm
        found[f"parameters/update_ratio/{layer}"] = flow.update_ratio
    for block, numbers in diagnosis.activations.items():
        found |= {f"activations/{name}/{block}": value for name, value in numbers.items()}
    return found


def finite(numbers: Sequence[float]) -> list[float | None]:
    """With a gap where a number is not finite: JSON has no such numbers."""
    return [number if math.isfinite(number) else None for number in numbers]
