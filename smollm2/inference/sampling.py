"""Sample tokens from logits; the settings have the same names, meanings and order as in transformers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Raise ConfigError for an impossible value."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (
                0 <= self.temperature < float("inf"),
                "0 (always the most likely token) or a positive number",
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "a whole number of at least 1"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "a number from 0.01 to 100 (1: off)"),
        }
        for name, (is_allowed, range_) in allowed.items():
            if not is_allowed:
                raise ConfigError(name, f"{getattr(self, name)} is out of range", f"use {range_}")


def sample(
    logits: Tensor, sampling: Sampling, ids: Sequence[Sequence[int]], generators: Sequence[torch.Generator]
) -> list[int]:
    """Return one token for each row of logits (B, V): the most likely at temperature 0, else a random one.

    `ids` are each row's prompt and continuation, which the repetition penalty uses; `generators` has one generator for
    each row. Raise TrainingError if the logits
    contain NaN or infinity, because no token can be drawn.
    """
    logits = logits.float().cpu()
    if not logits.amax(-1).isfinite().all():  # amax returns NaN or infinity if there is one
        raise TrainingError(
            "the model's logits", "contain NaN or infinity, so no token can be sampled", "use an earlier checkpoint"
        )
    if sampling.repetition_penalty != 1:
        logits = torch.stack([penalize(row, seen, sampling) for row, seen in zip(logits, ids, strict=True)])
    if sampling.temperature == 0:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest
    probabilities = keep_likely(logits, sampling).softmax(-1)
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(probabilities, generators, strict=True)]


def penalize(logits: Tensor, ids: Sequence[int], sampling: Sampling) -> Tensor:
    """Return logits (V,), reduced for tokens that are already in the prompt or continuation (arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(ids)))
    found, penalty = logits[seen], sampling.repetition_penalty
    return logits.index_copy(0, seen, torch.where(found < 0, found * penalty, found / penalty))


def keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits (B, V) / temperature, with -inf for tokens that top_k, then top_p, then min_p exclude."""
    logits = divide_by_temperature(logits, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1)
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[:, -1] = False  # the most likely token always stays
        logits = logits.masked_fill(tail.scatter(-1, order, tail), float("-inf"))
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        limit = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < limit, float("-inf"))
    return logits


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return logits (B, V) / temperature, shifted so that the largest is 0 if the quotient overflows float32.

    Even a tiny temperature then selects the most likely token.
    """
    scaled = logits / temperature
    if scaled.isfinite().all():
        return scaled
    return ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
