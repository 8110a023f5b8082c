"""One optimizer update: micro-batches, one division by the global count, clip, finite?, step.

The unit is the global batch. How it is cut into micro-batches and over ranks changes rounding, nothing else: every
micro-batch's loss sum is divided by the number of targets in the whole batch, known before the first forward pass.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smollm2.config.schema import IGNORE_INDEX
from smollm2.errors import ConfigError, TrainingError
from smollm2.runtime.device import Runtime
from smollm2.training.optim import set_learning_rate

MAX_SKIPS_IN_A_ROW = 10
MAX_SKIPS_IN_1000 = 10
MAX_OVERFLOWS_IN_A_ROW = 20
SPIKE_WINDOW = 128
SPIKE_SIGMAS = 6

MicroBatch = tuple[Tensor, ...]
"""input_ids, labels and, where documents are isolated, document_ids, each (B, T)."""


class MicroBatchTooLarge(Exception):
    """Some rank had no memory for it; all ranks raise this together, and the step begins anew in smaller ones."""


@dataclass(frozen=True)
class StepResult:
    """What one update reports: `loss` is the global mean without z-loss, `grad_norm` the norm before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    skipped: bool
    clipped: bool = False


def micro_batch_size(global_batch: int, world_size: int, batch_size: int) -> int:
    """Sequences in one forward pass of one rank: the largest divisor of the rank's share up to `batch_size`.

    Raises ConfigError, naming the nearest batch that divides, where the ranks cannot share the global batch equally.
    """
    if global_batch % world_size:
        lower = global_batch // world_size * world_size
        nearest = [n for n in (lower, lower + world_size) if n]
        raise ConfigError(
            f"training.batch_size x training.gradient_accumulation_steps is {global_batch} sequences, which {world_size} "
            f"devices cannot share equally; nearest that they can: {' or '.join(map(str, nearest))}"
        )
    share = global_batch // world_size
    return max(n for n in range(1, min(share, batch_size) + 1) if share % n == 0)


def smaller_micro_batch(share: int, size: int) -> int | None:
    """The next rung of the ladder after running out of memory: the largest divisor of a rank's share up to half of `size`."""
    return max((n for n in range(1, size // 2 + 1) if share % n == 0), default=None)


def update(
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    micro_batches: Sequence[MicroBatch],
    runtime: Runtime,
    *,
    learning_rate: float,
    max_grad_norm: float,
    z_loss: float = 0.0,
    look: contextlib.AbstractContextManager[object] | None = None,
) -> StepResult:
    """One update from this rank's micro-batches.

    Weights and moments move only where the loss and the gradient's norm are finite, on every rank or on none; `look` is
    entered before. Raises MicroBatchTooLarge as `accumulate_gradients` does.
    """
    started = time.perf_counter()
    set_learning_rate(optimizers, learning_rate)
    loss, tokens = accumulate_gradients(model, micro_batches, runtime, z_loss=z_loss)
    for optimizer in optimizers.values():
        runtime.scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()  # the one wait for the device
    finite = runtime.all_agree(math.isfinite(loss_value) and math.isfinite(norm_value))
    clipped = finite and 0 < max_grad_norm < norm_value
    with look or contextlib.nullcontext():
        if clipped:
            torch._foreach_mul_(gradients, max_grad_norm / (norm_value + 1e-6))
        if finite:
            for optimizer in optimizers.values():
                optimizer.step()
    adjust_scale(runtime.scaler)
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, learning_rate, tokens, time.perf_counter() - started, not finite, clipped)


def accumulate_gradients(
    model: nn.Module, micro_batches: Sequence[MicroBatch], runtime: Runtime, *, z_loss: float = 0.0
) -> tuple[Tensor, int]:
    """Add to every parameter's `grad` the gradient of the global mean loss; returns that loss and the target count.

    Raises MicroBatchTooLarge, with no gradient left behind, on all ranks where one ran out of memory. In the last backward
    pass several ranks meet, and who runs out there can tell the others only by ending: OutOfMemoryError.
    """
    local = torch.stack([(labels != IGNORE_INDEX).sum() for _, labels, *_ in micro_batches]).sum()
    count = runtime.sum(local)
    scale = runtime.world_size / count.float()  # DDP averages gradients over ranks
    total = torch.zeros((), dtype=torch.float32, device=runtime.device)
    before_meeting = len(micro_batches) - (runtime.world_size > 1)
    meeting: list[Tensor] = []

    def forward(micro_batch: MicroBatch) -> Tensor:
        runtime.pulse.mark("a micro-batch")
        with runtime.autocast():
            loss, _ = model(*micro_batch, z_loss=z_loss)
        total.add_(loss.detach())
        return cast(Tensor, runtime.scaler.scale(loss * scale))

    def go_alone() -> None:
        for micro_batch in micro_batches[:before_meeting]:
            torch.autograd.backward(forward(micro_batch))
        meeting.extend(map(forward, micro_batches[before_meeting:]))

    with runtime.accelerator.no_sync(model):
        try_to_fit(model, runtime, go_alone)
    for loss in meeting:
        runtime.pulse.mark("a micro-batch", waits=True)
        with runtime.accelerator.trigger_sync_in_backward(model):
            torch.autograd.backward(loss)
    return runtime.sum(total) / count, int(count)


def rehearse(model: nn.Module, micro_batch: MicroBatch, runtime: Runtime) -> None:
    """Both passes over one micro-batch, for nothing: what does not fit is found before ranks wait for one another."""

    def both_passes() -> None:
        with runtime.autocast():
            loss, _ = model(*micro_batch)
        loss.backward()

    with runtime.accelerator.no_sync(model):
        try_to_fit(model, runtime, both_passes)
    model.zero_grad(set_to_none=True)


def try_to_fit(model: nn.Module, runtime: Runtime, work: Callable[[], object]) -> None:
    """Do the work. Raises MicroBatchTooLarge on all ranks, the gradients dropped, where one of them runs out of memory."""
    ran_out = False
    try:
        work()
    except torch.OutOfMemoryError:
        ran_out = True  # and not from in here: the exception would keep the activations
    if runtime.highest(ran_out):
        model.zero_grad(set_to_none=True)
        raise MicroBatchTooLarge


def adjust_scale(scaler: torch.amp.GradScaler) -> None:
    """Let fp16's loss scale halve after an overflow and double after 2,000 good steps. Raises TrainingError below 1:
    torch's scaler goes on to exactly 0, and the next healthy step then writes NaN into the weights."""
    if not scaler.is_enabled():
        return
    scaler.update()
    if scaler.get_scale() < 1:
        raise TrainingError(
            "fp16 overflows even at a loss scale of 1: the gradients do not fit; use training.precision bf16 or float32, "
            "or a lower training.learning_rate"
        )


def is_spike(losses: Sequence[float], loss: float) -> bool:
    """Whether `loss` is over the mean of the last 128 finite losses by more than 6 of their standard deviations."""
    if len(losses) < SPIKE_WINDOW:
        return False
    return loss > statistics.fmean(losses) + SPIKE_SIGMAS * statistics.pstdev(losses)


def too_many_skips(skipped: Sequence[int], step: int, *, fp16: bool) -> str | None:
    """Why a run that skipped the updates `skipped` must stop after `step`, or None.

    Ten in a row or 1 % of the last 1,000; with fp16, whose overflows belong to finding the scale, 20 in a row.
    """
    run = 0
    while run < len(skipped) and skipped[-1 - run] == step - run:
        run += 1
    limit = MAX_OVERFLOWS_IN_A_ROW if fp16 else MAX_SKIPS_IN_A_ROW
    if run >= limit:
        return f"{run} updates in a row had a loss or gradient that is not finite"
    recent = sum(s > step - 1000 for s in skipped)
    if not fp16 and recent > MAX_SKIPS_IN_1000:
        return f"{recent} of the last 1000 updates had a loss or gradient that is not finite"
    return None
