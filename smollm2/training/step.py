"""One optimizer step: accumulate the gradients of the micro-batches, check that they are finite, clip them, and update.

How the global batch is split into micro-batches and across ranks changes only rounding: the loss sum of every
micro-batch is divided by the number of targets in the whole batch, which is known before the first forward pass.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smollm2.config.schema import IGNORE_INDEX, Config
from smollm2.data.windows import Batch
from smollm2.errors import TrainingError
from smollm2.runtime.device import Runtime
from smollm2.runtime.sharding import recover, whole
from smollm2.training.examiner import ONLY_FINITE, Decision, Examiner
from smollm2.training.memory import (
    MicroBatchChoice,
    describe_smaller,
    is_out_of_memory,
    no_room_for_one_sequence,
    smaller_micro_batch,
)
from smollm2.training.optim import set_learning_rate

MicroBatch = tuple[Tensor, ...]
"""input_ids, labels and, if documents are isolated, document_ids, each of shape (B, T)."""


class MicroBatchTooLarge(Exception):
    """A rank ran out of memory. All ranks raise this together, and the step restarts with smaller micro-batches."""


@dataclass(frozen=True)
class StepResult:
    """The result of one step: `loss` is the global mean without z-loss, `grad_norm` the norm before clipping; `spike` names
    the one of them that is far above those of the last steps."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    skipped: bool
    clipped: bool = False
    spike: str = ""


def train_step(
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    micro_batches: Sequence[MicroBatch],
    runtime: Runtime,
    *,
    learning_rate: float,
    max_grad_norm: float,
    z_loss: float = 0.0,
    diagnostics: contextlib.AbstractContextManager[object] | None = None,
    examiner: Examiner = ONLY_FINITE,
) -> StepResult:
    """Take one optimizer step with this rank's micro-batches.

    Weights and moments change only if the loss and the gradient norm are finite on every rank; about unusual numbers the
    `examiner` decides. `diagnostics` encloses the update. Raise MicroBatchTooLarge as `accumulate_gradients` does.
    """
    started = time.perf_counter()
    set_learning_rate(optimizers, learning_rate)
    loss, tokens = accumulate_gradients(model, micro_batches, runtime, z_loss=z_loss)
    for optimizer in optimizers.values():
        runtime.scaler.unscale_(optimizer)
    found = Decision(*read_numbers(model, loss))
    if not runtime.all_agree(examiner.is_usual(found.loss, found.grad_norm)):
        found = examiner.examine(found.loss, found.grad_norm)
    clipped = found.updates and 0 < max_grad_norm < found.grad_norm
    with diagnostics or contextlib.nullcontext():
        if clipped:
            torch._foreach_mul_(gradients_of(model), max_grad_norm / (found.grad_norm + 1e-6))
        if found.updates:
            for optimizer in optimizers.values():
                optimizer.step()
    adjust_loss_scale(runtime.scaler)
    model.zero_grad(set_to_none=True)
    seconds, skipped = time.perf_counter() - started, not found.updates
    return StepResult(found.loss, found.grad_norm, learning_rate, tokens, seconds, skipped, clipped, found.spike)


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def read_numbers(model: nn.Module, loss: Tensor) -> tuple[float, float]:
    """Return the loss and the norm of all gradients: the only synchronization with the device in a step."""
    norm = whole(torch.nn.utils.get_total_norm(gradients_of(model)))
    loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
    return loss_value, norm_value


def split(batch: Batch, size: int, runtime: Runtime) -> list[MicroBatch]:
    """Return this rank's batch on the device, split into as few nearly equal micro-batches as `size` sequences allow."""
    count = -(-len(batch.input_ids) // size)
    parts = (torch.tensor_split(runtime.to_device(array), count) for array in batch if array is not None)
    return list(zip(*parts, strict=True))


def accumulate_gradients(
    model: nn.Module, micro_batches: Sequence[MicroBatch], runtime: Runtime, *, z_loss: float = 0.0
) -> tuple[Tensor, int]:
    """Add the gradient of the global mean loss to every `grad`; return that loss and the number of targets.

    Raise MicroBatchTooLarge on all ranks, with all gradients cleared, if one of them runs out of memory. With several
    ranks, the last backward pass is a collective: a rank that runs out of memory there raises OutOfMemoryError alone. If
    the model is shared out, every pass is one, and MicroBatchTooLarge is raised only if all ranks run out of memory.
    """
    is_sharded = runtime.layout.is_sharded
    local_count = torch.stack([(labels != IGNORE_INDEX).sum() for _, labels, *_ in micro_batches]).sum()
    targets = runtime.sum(local_count)
    count = targets.clamp(min=1)  # a batch of prompts alone gives the loss 0 and no gradient
    scale = runtime.world_size / count.float()  # DDP averages gradients over ranks
    # In fp16 the loss computes its gradients at the loss scale, so that a smaller scale helps against every overflow.
    in_fp16 = {"gradient_scale": runtime.scaler.scale(scale)} if runtime.scaler.is_enabled() else {}
    total = torch.zeros((), dtype=torch.float32, device=runtime.device)
    synchronized = micro_batches[-1:] if runtime.world_size > 1 and not is_sharded else []
    pending_losses: list[Tensor] = []

    def forward(micro_batch: MicroBatch) -> Tensor:
        runtime.pulse.mark("a micro-batch", waits=is_sharded)
        with runtime.autocast():
            loss, _ = model(*micro_batch, z_loss=z_loss, **in_fp16)
        total.add_(loss.detach())
        return cast(Tensor, runtime.scaler.scale(loss * scale))

    def compute_alone() -> None:
        for micro_batch in micro_batches[: len(micro_batches) - len(synchronized)]:
            torch.autograd.backward(forward(micro_batch))
        pending_losses.extend(map(forward, synchronized))

    with runtime.accelerator.no_sync(model):
        run_within_memory(model, runtime, compute_alone)
    for loss in pending_losses:
        runtime.pulse.mark("a micro-batch", waits=True)
        with runtime.accelerator.trigger_sync_in_backward(model):
            torch.autograd.backward(loss)
    return runtime.sum(total) / count, int(targets)


def rehearse(model: nn.Module, config: Config, runtime: Runtime, choice: MicroBatchChoice) -> MicroBatchChoice:
    """Return the largest micro-batch, at most the chosen one, whose forward and backward pass fit into memory.

    If memory runs out, it does so here, before the ranks wait for one another. Raise ResourceError if not even one
    sequence fits.
    """
    size: int | None = choice.size
    while size:
        tokens = torch.zeros(size, config.training.sequence_length, dtype=torch.int64, device=runtime.device)
        micro_batch = (tokens,) * (3 if config.data.document_mask else 2)

        def run_both_passes(micro_batch: MicroBatch = micro_batch) -> None:
            with runtime.autocast():
                loss, _ = model(*micro_batch)
            loss.backward()

        try:
            with runtime.accelerator.no_sync(model):
                run_within_memory(model, runtime, run_both_passes)
        except MicroBatchTooLarge:
            size = smaller_micro_batch(config.global_batch_size // runtime.world_size, size)
            continue
        model.zero_grad(set_to_none=True)
        return choice if size == choice.size else MicroBatchChoice(size, describe_smaller(config, choice.size, size))
    raise no_room_for_one_sequence(config)


def run_within_memory(model: nn.Module, runtime: Runtime, work: Callable[[], object]) -> None:
    """Call `work`. If memory runs out on any rank, clear the gradients and raise MicroBatchTooLarge on all ranks.

    If the model is shared out, the other ranks cannot go on without this one: raise OutOfMemoryError if only some run out.
    """
    ran_out, is_sharded = False, runtime.layout.is_sharded
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or (is_sharded and not runtime.layout.all_meet()):
            raise
        ran_out = True  # raised below: the caught exception would keep the activations alive
    if ran_out if is_sharded else runtime.highest(ran_out):
        recover(model)
        raise MicroBatchTooLarge


def adjust_loss_scale(scaler: torch.amp.GradScaler) -> None:
    """Halve fp16's loss scale after an overflow, and double it after 2,000 good steps.

    Raise TrainingError if it falls below 1: torch's scaler would go down to exactly 0, and the next good step would
    then write NaN into the weights.
    """
    if not scaler.is_enabled():
        return
    scaler.update()
    if scaler.get_scale() < 1:
        raise TrainingError(
            "training.precision",
            "fp16 overflows even at a loss scale of 1",
            "use bf16 or float32, or a lower training.learning_rate",
        )
