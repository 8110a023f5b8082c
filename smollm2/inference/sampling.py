"""How a token is drawn from the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, with transformers' names, meanings and order. Raises ConfigError for an impossible value."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 <= self.temperature < float("inf"), "0 (the likeliest token) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
        }
        for name, (fits, range_) in allowed.items():
            if not fits:
                raise ConfigError(f"{name} - {getattr(self, name)} will not do - give {range_}")


def sample(
    logits: Tensor, sampling: Sampling, ids: Sequence[Sequence[int]], generators: Sequence[torch.Generator]
) -> list[int]:
    """Return one token for each row of logits (B, V): the likeliest at temperature 0, else drawn by the row's generator.

    `ids` are the tokens of prompt and continuation, which the repetition penalty reads.
    """
    logits = logits.float().cpu()
    if sampling.repetition_penalty != 1:
        logits = torch.stack([penalize(row, seen, sampling) for row, seen in zip(logits, ids, strict=True)])
    if sampling.temperature == 0:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest
    probabilities = keep_likely(logits, sampling).softmax(-1)
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(probabilities, generators, strict=True)]


def penalize(logits: Tensor, ids: Sequence[int], sampling: Sampling) -> Tensor:
    """Logits (V,) with those of tokens that prompt or continuation hold made smaller (arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(ids)))
    found, penalty = logits[seen], sampling.repetition_penalty
    return logits.index_copy(0, seen, torch.where(found < 0, found * penalty, found / penalty))


def keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) over the temperature, -inf for what top_k, then top_p, then min_p leave out."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1)
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[:, -1] = False  # the likeliest always stays
        logits = logits.masked_fill(tail.scatter(-1, order, tail), float("-inf"))
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        limit = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < limit, float("-inf"))
    return logits
