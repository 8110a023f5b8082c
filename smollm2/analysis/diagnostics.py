"""Diagnostics of the model at one step: gradients, weights, weight updates and activations.

Diagnostics only read the model, and no hooks or copies remain afterwards: a run is bit-identical with and without them.
Activations are measured after the step, in a separate forward pass without gradients. This pass needs less memory than
the step and does not touch the compiled or checkpointed graph that training uses.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smollm2.model.transformer import Attention, Block, SmolLM2
from smollm2.runtime.sharding import ALONE, Layout, local
from smollm2.tracking.base import Diagnosis, Histogram

BINS = 64
DEAD = 1e-3
"""A hidden unit is dead if, for every token of the micro-batch, its absolute value is at most this fraction of the root
mean square of its block's hidden units."""

COUNTABLE = 2**24
"""torch.histc counts in float32, which represents every integer up to this one exactly."""

SCORES = 2**24
"""The maximum number of attention logits in memory at one time."""


class StepDiagnostics(contextlib.AbstractContextManager["StepDiagnostics"]):
    """A context manager around an optimizer step that collects diagnostics; the gradients must be complete on entry.

    It keeps a copy of the weights (4 bytes per parameter) until it exits, while no activations are in memory. If
    there are several ranks, the gradients are already averaged, so one rank collects alone, without a collective; if the
    model is shared out, each rank collects from its part, and all must do so together.
    """

    def __init__(
        self,
        model: nn.Module,
        counted: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        histograms: bool,
        layout: Layout = ALONE,
    ) -> None:
        """`counted()` measures the time of all work. Histograms are optional because they cost the most time."""
        self.weights = dict(model.named_parameters())
        self.counted, self.histograms, self.layout = counted, histograms, layout
        self.diagnosis = Diagnosis({}, {}, {}, {}, math.nan)

    @torch.no_grad()
    def __enter__(self) -> "StepDiagnostics":
        with self.counted():
            gradients = {name: local(gradient_of(p)) for name, p in self.weights.items()}
            self.gradient_norms = self.layout.combine_norms(torch._foreach_norm(list(gradients.values())))
            self.gradient_histograms = make_histograms(gradients, self.layout) if self.histograms else {}
            self.before = [local(p.detach()).clone() for p in self.weights.values()]
        return self

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        with self.counted():
            updates, self.before = self.before, []
            parts = {name: local(p.detach()) for name, p in self.weights.items()}
            weights = list(parts.values())
            torch._foreach_sub_(updates, weights)
            norms = (
                self.gradient_norms,
                self.layout.combine_norms(torch._foreach_norm(weights)),
                self.layout.combine_norms(torch._foreach_norm(updates)),
            )
            gradient_norms, weight_norms, update_norms = torch.stack(norms).tolist()  # the only sync besides histograms
            ratios = [u / w if w else math.nan for u, w in zip(update_norms, weight_norms, strict=True)]
            self.diagnosis = Diagnosis(
                gradient_norms=dict(zip(self.weights, gradient_norms, strict=True)),
                weight_norms=dict(zip(self.weights, weight_norms, strict=True)),
                update_ratios=dict(zip(self.weights, ratios, strict=True)),
                activations={},
                clipped=math.nan,
                gradient_histograms=self.gradient_histograms,
                weight_histograms=make_histograms(parts, self.layout) if self.histograms else {},
            )


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter; zeros if it is frozen or unused."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def make_histograms(tensors: Mapping[str, Tensor], layout: Layout = ALONE) -> dict[str, Histogram]:
    """Return a histogram of each tensor, with 64 equal bins from minimum to maximum; omit non-finite tensors."""
    extremes = layout.combine_extremes(torch.stack([find_extremes(tensor) for tensor in tensors.values()])).tolist()
    ranges = {
        name: (low, high) if low < high else (low - 0.5, high + 0.5)
        for name, (low, high) in zip(tensors, extremes, strict=True)
        if math.isfinite(low) and math.isfinite(high)
    }
    if not ranges:
        return {}
    counts = layout.combine_sums(torch.stack([count(tensors[name], *ranges[name]) for name in ranges])).tolist()
    return {
        name: Histogram(numbers, [low + (high - low) * index / BINS for index in range(BINS)] + [high])
        for (name, (low, high)), numbers in zip(ranges.items(), counts, strict=True)
    }


def find_extremes(tensor: Tensor) -> Tensor:
    """Return (minimum, maximum), (2,) float32; (inf, -inf) of a tensor without elements, as a part of one may be."""
    if not tensor.numel():
        return torch.tensor([math.inf, -math.inf], device=tensor.device)
    return torch.stack(tensor.aminmax()).float()


def count(tensor: Tensor, low: float, high: float) -> Tensor:
    """Return the number of values in each bin, (64,) int64."""
    parts = torch.split(tensor.detach().float().flatten(), COUNTABLE)
    return torch.stack([torch.histc(part, BINS, low, high) for part in parts]).long().sum(0)  # MPS has no float64


@torch.no_grad()
def measure_activations(
    model: SmolLM2, input_ids: Tensor, document_ids: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Return activation statistics of each block in a forward pass over input_ids (B, T), with document_ids if given.

    For each block: the root mean square and the largest absolute value of its output, its largest attention logit, and
    the fraction of its SwiGLU hidden units that are dead. The hooks are always removed.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks would make compiled blocks recompile
        for number, layer in enumerate(model.model.layers):
            readings = found[f"model.layers.{number}"] = {}
            for handle in hook(cast(Block, layer), readings):
                stack.callback(handle.remove)
        model.model(input_ids, document_ids)
    numbers = torch.stack([torch.stack(list(readings.values())) for readings in found.values()]).tolist()
    return {
        name: dict(zip(readings, row, strict=True))
        for (name, readings), row in zip(found.items(), numbers, strict=True)
    }


def hook(block: Block, readings: dict[str, Tensor]) -> Iterator[RemovableHandle]:
    """Register hooks that store a block's statistics in `readings` when it is called; yield their handles."""

    def read_attention(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        readings["max_attention_logit"] = find_largest_logit(cast(Attention, attention), *inputs[:3])

    def read_hidden(projection: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].flatten(0, -2)
        peaks = torch.linalg.vector_norm(hidden, math.inf, dim=0).float()
        readings["dead_units"] = (peaks <= DEAD * root_mean_square(hidden)).float().mean()

    def read_output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        readings["rms"] = root_mean_square(output)
        readings["max_abs"] = torch.linalg.vector_norm(output, math.inf).float()

    yield block.self_attn.register_forward_pre_hook(read_attention)
    yield block.mlp.down_proj.register_forward_pre_hook(read_hidden)
    yield block.register_forward_hook(read_output)


def root_mean_square(x: Tensor) -> Tensor:
    """Return the root mean square of x, summed in float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
    return norm / math.sqrt(x.numel())


def find_largest_logit(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the largest attention logit q k^T / sqrt(D) under the causal mask, in float32; x is (B, T, C)."""
    q, k = attention.queries_and_keys(x, cos, sin)
    q = q.reshape(*k.shape[:2], -1, *q.shape[2:])  # B K H/K T D
    keys = k.unsqueeze(2).transpose(-1, -2)
    length, largest = x.shape[1], []
    rows = max(1, SCORES // (q[..., 0].numel()))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        scores = q[..., start:stop, :] @ keys[..., :stop]
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=x.device).triu(start + 1)
        largest.append(scores.masked_fill_(future, -math.inf).amax())
    return torch.stack(largest).amax().float().mul(attention.head_dim**-0.5)
