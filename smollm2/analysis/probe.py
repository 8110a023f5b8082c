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

IN_16_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Probe:
    """A model and how to call it.

    `logits` maps token ids (B, T), and document ids (B, T) or None, to logits (B, T, V). `loss` maps token ids and labels
    (B, T), where labels[t] is the token after input_ids[t] or -100, to the sum of the losses of the targets; None if the
    model has no loss function. `length` is the number of positions of the small inputs. `may_freeze` says whether a frozen
    parameter may be meant. `padding_id` is an id whose embedding gets no gradient on purpose, and is not drawn.
    """

    module: nn.Module
    vocab_size: int
    device: torch.device
    length: int
    logits: Callable[[Tensor, Tensor | None], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    isolates: bool = False
    seed: int = 0
    may_freeze: bool = False
    padding_id: int | None = None

    def draw(self, count: int = 1, salt: int = 0) -> Tensor:
        """Return random token ids, (count, T)."""
        generator = torch.Generator().manual_seed(self.seed + salt)
        ids = torch.randint(self.vocab_size, (count, self.length), generator=generator)
        if self.padding_id is not None:
            ids[ids == self.padding_id] = (self.padding_id + 1) % self.vocab_size
        return ids.to(self.device)

    def other(self, ids: Tensor) -> Tensor:
        """Return, for each id, another one of the vocabulary, which must have two."""
        return (ids + (self.vocab_size + 1) // 2) % self.vocab_size

    def read(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) in float32, of the model in evaluation mode. Raise FloatingPointError as finite does."""
        with evaluating(self.module), torch.no_grad():
            return finite(self.logits(ids, documents).float())


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


def finite(logits: Tensor) -> Tensor:
    """Return the logits with 0 for minus infinity, by which models exclude ids that no token has.

    Raise FloatingPointError if any other is not finite, because no difference to it says anything.
    """
    found = logits.masked_fill(logits == -torch.inf, 0.0)
    if wrong := int((~found.isfinite()).sum()):
        raise FloatingPointError(f"{wrong:,} of {found.numel():,} logits are not finite")
    return found


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one, 0 if there is no element."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def record_outputs(probe: Probe, ids: Tensor, position: int) -> dict[str, Tensor]:
    """Return the output at one position of every submodule that has one per position, in order of completion."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        first = next(iter(output), None) if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor) and first.ndim > 2 and first.shape[:2] == ids.shape:
            found.setdefault(name, first[0, position].detach().clone())

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name, module in probe.module.named_modules()
        if name
    ]
    try:
        probe.read(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def is_coarse(probe: Probe) -> bool:
    """Return whether any submodule computes in 16 bits."""
    return any(output.dtype in IN_16_BITS for output in record_outputs(probe, probe.draw(), 0).values())
