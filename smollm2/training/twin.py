"""The twin of a run's model: two layers of the same widths and a small vocabulary, trained by the run's own functions.

What steps, saves or moves weights is checked on it, so that the run's model stays as it is.
"""

import contextlib
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smollm2.analysis.probe import Probe, largest
from smollm2.config.schema import IGNORE_INDEX, ModelConfig
from smollm2.data.windows import Batch
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.precision import Precision
from smollm2.runtime.sharding import ALONE
from smollm2.training.optim import build_optimizers
from smollm2.training.setup import Run
from smollm2.training.step import StepResult, split, train_step

LENGTH, VOCABULARY, LAYERS, ROWS = 64, 512, 2, 4
"""Positions, ids and layers of the twin at most, and the sequences of its batch."""


@dataclass(frozen=True)
class Twin:
    """A run whose model is the twin; `rows` is a batch of it, in which every sequence has another number of targets."""

    run: Run
    model: SmolLM2
    probe: Probe
    rows: Batch

    def again(self) -> "Twin":
        """Return a twin with the same initial weights and new optimizers."""
        return make_twin(self.run)

    def step(
        self,
        batch: Batch,
        size: int = ROWS,
        *,
        rate: float = 0.0,
        max_grad_norm: float = 0.0,
        watch: "Capture | None" = None,
    ) -> StepResult:
        """Take one step of training, in micro-batches of `size` sequences."""
        return train_step(
            self.model,
            self.run.optimizers,
            split(batch, size, self.run.runtime),
            self.run.runtime,
            learning_rate=rate,
            max_grad_norm=max_grad_norm,
            diagnostics=watch,
        )


class Capture(contextlib.AbstractContextManager["Capture"]):
    """The gradients of a step, as they are before clipping and as the optimizers get them."""

    def __init__(self, model: SmolLM2) -> None:
        self.model = model
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def __enter__(self) -> "Capture":
        self.before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        self.after = self._read()

    def _read(self) -> dict[str, Tensor]:
        return {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}


def make_twin(run: Run) -> Twin:
    """Return the twin of a run. It draws its weights from the seed; the caller restores the random state."""
    m, runtime, t = run.config.model, dataclasses.replace(run.runtime, layout=ALONE), run.config.training
    wanted = {
        "vocab_size": min(m.vocab_size, VOCABULARY),
        "num_hidden_layers": min(m.num_hidden_layers, LAYERS),
        "max_position_embeddings": min(m.max_position_embeddings, LENGTH),
        "initializer_range": m.hidden_size**-0.5,  # so that attention is not uniform
        "init_from": None,
    }
    torch.manual_seed(t.seed)
    model = SmolLM2(ModelConfig.model_validate({**m.model_dump(), **wanted})).to(runtime.device)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "norm" in name):
            parameter.add_(0.2 * torch.randn_like(parameter))  # a weight of 1 would hide that it is not used
    model.model.attention_backend, model.model.checkpointing = (
        run.model.model.attention_backend,
        run.model.model.checkpointing,
    )
    probe = make_probe(dataclasses.replace(run, model=model, runtime=runtime))
    rows = probe.draw(ROWS, salt=2).cpu().numpy()
    labels = np.roll(rows, -1, axis=1)
    for row in range(ROWS):
        labels[row, probe.length - 1 - row * probe.length // (2 * ROWS) :] = IGNORE_INDEX
    documents = np.zeros_like(rows) if run.config.data.document_mask else None
    own = dataclasses.replace(
        run, model=model, prepared=model, optimizers=build_optimizers(model, t), runtime=runtime, saver=None
    )
    return Twin(own, model, probe, Batch(rows, labels, documents))


def make_probe(run: Run, *, in_float32: bool = False) -> Probe:
    """Return the probe of a run's model, called as training calls it, or in float32."""
    model, runtime, config = run.model, run.runtime, run.model.config
    if in_float32:
        runtime = dataclasses.replace(runtime, precision=Precision("float32", "for a check"))

    def logits(ids: Tensor, documents: Tensor | None) -> Tensor:
        with runtime.autocast():
            found: Tensor = model(ids, document_ids=documents)
        return found

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        with runtime.autocast():
            total: Tensor = model(ids, labels)[0]
        return total

    return Probe(
        model,
        config.vocab_size,
        runtime.device,
        min(LENGTH, config.max_position_embeddings),
        logits,
        loss,
        run.config.data.document_mask,
        run.config.training.seed % 2**31,
    )


def rounding_of(twin: Twin) -> float:
    """Return the largest relative difference that another order of additions explains."""
    wide = twin.run.runtime.precision.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return 1e-4 if wide else 5e-2


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference between two sets of tensors, relative to the tensor, and the name of that tensor."""
    if first.keys() != second.keys():
        return float("inf"), next(iter(first.keys() ^ second.keys()))
    return max((largest(first[name] - second[name]) / max(largest(second[name]), 1e-30), name) for name in first)


def weights_of(twin: Twin) -> dict[str, Tensor]:
    """Return the weights by name."""
    return {name: p.detach() for name, p in twin.model.named_parameters()}
