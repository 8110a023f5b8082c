"""A small GPT as people write one, with the faults that they make; `smollm2 verify` is tried on it."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAULT = "SABOTAGE"
"""The environment variable that chooses the fault."""


class GPT(nn.Module):
    """Two layers, learned positions; the fault is read when it is built."""

    def __init__(self, vocab_size: int = 97, width: int = 48, length: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fault = os.environ.get(FAULT, "")
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        layer = {"nhead": 4, "dim_feedforward": 96, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, **layer) for _ in range(2))  # type: ignore[arg-type]
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids)
        if self.fault != "no positions":
            x = x + self.positions(torch.arange(length))
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        for layer in self.layers:
            x = layer(x.detach() if self.fault == "detached" else x, None if self.fault == "no mask" else mask)
        if self.fault == "dropout":
            x = F.dropout(x, 0.1, training=True)
        if self.fault == "batch":
            x = x + 0.1 * x.mean(0, keepdim=True)
        out: Tensor = self.head(x)
        return out


def build() -> nn.Module:
    """Return the model."""
    return GPT()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of the next tokens, shifted as the fault says."""
    shift = {"no shift": 0, "double shift": 2}.get(os.environ.get(FAULT, ""), 1)
    logits = model(ids)[:, : ids.shape[1] - shift]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, shift:].flatten())


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels."""
    generator = torch.Generator().manual_seed(0)
    shift = 2 if os.environ.get(FAULT) == "shifted data" else 1
    while True:
        ids = torch.randint(97, (2, 40), generator=generator)
        yield ids[:, :-shift], ids[:, shift:]
        if os.environ.get(FAULT) == "same batch":
            generator.manual_seed(0)
