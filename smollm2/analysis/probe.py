"""A model under test: what the checks of a model need to know of it, and small inputs for them.

Shapes: B sequences, T positions, V vocabulary. All inputs are drawn from a generator of their own, so that the checks do
not disturb the random state of a run.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROUNDING = 1e-5
"""The largest difference, relative to the effect that is looked for, that a different order of additions can explain."""


@dataclass(frozen=True)
class Probe:
    """A model and how to call it.

    `logits` maps token ids (B, T), and document ids (B, T) or None, to logits (B, T, V). `loss` maps token ids and labels
    (B, T), where labels[t] is the token after input_ids[t] or -100, to the sum of the losses of the targets; None if the
    model has no loss function. `length` is the number of positions of the small inputs.
    """

    module: nn.Module
    vocab_size: int
    device: torch.device
    length: int
    logits: Callable[[Tensor, Tensor | None], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    isolates: bool = False
    seed: int = 0

    def draw(self, count: int = 1, salt: int = 0) -> Tensor:
        """Return random token ids, (count, T)."""
        generator = torch.Generator().manual_seed(self.seed + salt)
        return torch.randint(self.vocab_size, (count, self.length), generator=generator).to(self.device)

    def other(self, ids: Tensor) -> Tensor:
        """Return, for each id, another one of the vocabulary."""
        return (ids + 1 + self.vocab_size // 2) % self.vocab_size

    def read(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) in float32, of the model in evaluation mode."""
        with evaluating(self.module), torch.no_grad():
            return self.logits(ids, documents).float()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the `with` block; compiled parts run uncompiled, to compile nothing for it."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for one, mode in modes.items():
            one.training = mode


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one, 0 if there is no element."""
    return tensor.abs().max().item() if tensor.numel() else 0.0
