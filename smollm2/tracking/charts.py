"""What trackers and the report draw: metrics by name and group, diagnostics by layer, figures of the loss landscape.

Parameters have their Hugging Face names. A layer is the common part of its parameters' names: `layers.3` for all of
block 3, else `embed_tokens`, `norm` or `lm_head`. Figures are plain plotly JSON, so plotly is not imported here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smollm2.tracking.base import Diagnosis, Landscape

BASELINES = ("uniform", "unigram", "bigram", "trigram", "5-gram")
"""The n-gram models of a run's own text, with whose losses its validation loss is compared; each reads more tokens."""

Figure = dict[str, Any]
"""A plotly figure as JSON: `data` and `layout`."""


@dataclass(frozen=True)
class Flow:
    """The norms of a layer's gradient and weights at one step, and its update ratio (update norm / weight norm)."""

    gradient_norm: float
    weight_norm: float
    update_ratio: float


def group_metrics(metrics: Mapping[str, float | int]) -> dict[str, float | int]:
    """Return the metrics with their group in the name, such as `train/loss` and `validation/loss`.

    W&B draws one section per group.
    """
    return {
        f"validation/{name.removeprefix('validation_')}" if name.startswith("validation_") else f"train/{name}": value
        for name, value in metrics.items()
    }


def baseline_metrics(details: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses of the event `baselines` as metrics of the group of the validation loss."""
    return {f"validation/baseline/{name}": details["losses"][name] for name in BASELINES}


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter, such as `layers.3` for `model.layers.3.mlp.up_proj.weight`."""
    block = re.search(r"\blayers\.\d+(?![^.])", parameter)
    return block[0] if block else parameter.removeprefix("model.").removesuffix(".weight").removesuffix(".bias")


def flow_by_layer(diagnosis: Diagnosis) -> dict[str, Flow]:
    """Return each layer's norms and update ratio, combined from its parameters, in the model's order.

    A number is NaN if it is missing for one of the parameters.
    """
    members: dict[str, list[str]] = {}
    for parameter in diagnosis.gradient_norms:
        members.setdefault(layer_of(parameter), []).append(parameter)

    def norm(values: Sequence[float]) -> float:
        return math.hypot(*values)

    flows = {}
    for layer, names in members.items():
        weights = [diagnosis.weight_norms.get(name, math.nan) for name in names]
        ratios = [diagnosis.update_ratios.get(name, math.nan) for name in names]
        weight = norm(weights)
        update = norm([ratio * size for ratio, size in zip(ratios, weights, strict=True)])
        gradient = norm([diagnosis.gradient_norms[name] for name in names])
        flows[layer] = Flow(gradient, weight, update / weight if weight else 0.0)
    return flows


def diagnosis_metrics(diagnosis: Diagnosis) -> dict[str, float]:
    """Return the values of a diagnosis as metrics that are named by layer or block."""
    found = {"gradients/clipped": diagnosis.clipped}
    for layer, flow in flow_by_layer(diagnosis).items():
        found[f"gradients/norm/{layer}"] = flow.gradient_norm
        found[f"parameters/norm/{layer}"] = flow.weight_norm
        found[f"parameters/update_ratio/{layer}"] = flow.update_ratio
    for block, numbers in diagnosis.activations.items():
        found |= {f"activations/{name}/{block}": value for name, value in numbers.items()}
    return found


def flow_figure(diagnosis: Diagnosis) -> Figure:
    """Return a figure of the gradient norm, the weight norm and the update ratio of each layer."""
    flows = flow_by_layer(diagnosis)
    curves = {
        "gradient norm": [flow.gradient_norm for flow in flows.values()],
        "weight norm": [flow.weight_norm for flow in flows.values()],
        "update / weight": [flow.update_ratio for flow in flows.values()],
    }
    return {
        "data": [{"type": "scatter", "x": list(flows), "y": finite(ys), "name": name} for name, ys in curves.items()],
        "layout": {"title": {"text": "Gradient flow"}, "xaxis": axis("layer"), "yaxis": {"type": "log"}},
    }


def landscape_figures(landscape: Landscape) -> dict[str, Figure]:
    """Return two figures of the landscape: a `surface` over both directions, and a `line` along the first.

    Both mark the loss at the weights themselves.
    """
    at, loss = list(landscape.grid_at), landscape.loss
    # In grid[i][j], i is along the first direction; in plotly's z[row][column], x is along the columns.
    grid = [finite(column) for column in zip(*landscape.grid, strict=True)]
    plane = {"x": at, "y": at, "z": grid}
    hover = "%{x:.3~g}, %{y:.3~g}: loss %{z:.4~f}<extra></extra>"
    centre = {"x": [0], "y": [0], "mode": "markers", "showlegend": False}
    centre |= {"hovertemplate": f"the weights: loss {loss:.4f}<extra></extra>"}
    title = {"title": {"text": f"Loss around the weights: {loss:.4f} at the centre"}}
    axes = {"xaxis": axis("first direction"), "yaxis": axis("second direction")}
    line = {"x": list(landscape.line_at), "y": finite(landscape.line), "mode": "lines", "name": "loss"}
    return {
        "surface": {
            "data": [
                {"type": "surface", **plane, "showscale": False, "hovertemplate": hover},
                {"type": "scatter3d", **centre, "z": finite([loss]), "marker": {"size": 4}},
            ],
            "layout": {**title, "scene": {**axes, "zaxis": axis("loss")}},
        },
        "line": {
            "data": [
                {"type": "scatter", **line, "hovertemplate": "%{x:.3~g}: %{y:.4f}<extra></extra>"},
                {"type": "scatter", **centre, "y": finite([loss]), "marker": {"size": 8}},
            ],
            "layout": {**title, "xaxis": axis("distance along the first direction"), "yaxis": axis("loss")},
        },
    }


def axis(title: str) -> Figure:
    """Return a plotly axis with a title."""
    return {"title": {"text": title}}


def finite(numbers: Sequence[float]) -> list[float | None]:
    """Return the numbers with each NaN and infinity replaced by None, because JSON has neither."""
    return [number if math.isfinite(number) else None for number in numbers]
