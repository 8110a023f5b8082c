"""Training and evaluation mode: a model that is used returns to the mode that it had."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block; restore its mode whatever happens there."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
