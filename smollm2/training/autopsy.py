"""The autopsy of a step with a spike, or whose loss or gradient is not finite: why, found by reruns before the update.

At this point the weights are still those that gave the numbers. The batch runs again as it did, which tells a fault of
memory or device from what can be reproduced; in float32, which shows what the precision did; and the batch before runs
on the same weights, which tells bad data from weights that an update had spoiled. Nothing of this changes the training.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smollm2.model.attention import choose_backend
from smollm2.runtime.device import Runtime
from smollm2.runtime.precision import Precision, device_features
from smollm2.runtime.random_state import random_state, restore_random_state
from smollm2.runtime.sharding import gathered
from smollm2.tracking.base import describe
from smollm2.training.causes import NOT_FINITE, TRANSIENT, Evidence, Numbers, weigh
from smollm2.training.examiner import Decision, Examiner
from smollm2.training.progress import Progress
from smollm2.training.setup import Run
from smollm2.training.spike_events import count_events, gather_facts, write_event
from smollm2.training.step import (
    MicroBatch,
    MicroBatchTooLarge,
    accumulate_gradients,
    gradients_of,
    read_numbers,
    split,
)

MAX_EVENTS = 20
"""Autopsies of one run; a run with more spikes has a lasting problem, which the first ones show."""


class SpikeExaminer(Examiner):
    """Examines the step after `progress` if its numbers are unusual, and decides by training.on_spike what becomes of it.

    `size` is the number of sequences in a micro-batch.
    """

    def __init__(self, run: Run, progress: Progress, micro_batches: Sequence[MicroBatch], size: int) -> None:
        self.run, self.progress, self.micro_batches, self.size = run, progress, micro_batches, size

    def is_usual(self, loss: float, grad_norm: float) -> bool:
        """Return whether both numbers are finite and neither is a spike."""
        return not self.find_problem(loss, grad_norm)

    def examine(self, loss: float, grad_norm: float) -> Decision:
        """Make the autopsy on all ranks, and return what becomes of the step.

        After a transient fault the step continues with the gradient of the rerun. fp16 finds its loss scale through
        overflows, so there a number that is not finite is no reason for an autopsy.
        """
        run, runtime = self.run, self.run.runtime
        found = runtime.gather((loss, grad_norm, self.find_problem(loss, grad_norm)))
        loss, grad_norm, problem = next(one for one in found if one[2])
        if problem == NOT_FINITE and runtime.scaler.is_enabled():
            return Decision(loss, grad_norm, updates=False)
        again = self.perform(problem, Numbers(loss, grad_norm))
        if again:
            return Decision(again.loss, again.grad_norm, updates=True)
        updates = problem != NOT_FINITE and run.config.training.on_spike == "keep"
        return Decision(loss, grad_norm, updates=updates, spike="" if problem == NOT_FINITE else problem)

    def find_problem(self, loss: float, grad_norm: float) -> str:
        """Return what is unusual about these numbers, or "" if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return NOT_FINITE
        return self.progress.find_spike(loss, grad_norm)

    def perform(self, problem: str, recorded: Numbers) -> Numbers | None:
        """Make and write the autopsy. If the fault was transient, leave the gradient of the rerun, and return its numbers.

        If it is not possible, report why.
        """
        run, runtime, step = self.run, self.run.runtime, self.progress.step + 1
        if runtime.gather(count_events(run.folder))[0] >= MAX_EVENTS:
            return None
        model, random = run.prepared, random_state()
        original = take_gradients(model)
        kept, result = original, None
        try:
            evidence, clean = self.rerun_all(problem, recorded)
            is_clean = evidence.cause == TRANSIENT and not self.find_problem(
                evidence.again.loss, evidence.again.grad_norm
            )
            if runtime.highest(is_clean):
                kept, result = clean, evidence.again
            put_back(model, original)
            shared = gather_facts(run, self.progress)
            # Rank 0 may be long. An error there is reported, and does not end the run.
            with gathered(run.model), runtime.together():
                if runtime.rank == 0:
                    write_event(run, self.progress, self.size, evidence, shared, takes_rerun=result is not None)
        except MicroBatchTooLarge:
            run.tracker.log_event("autopsy", f"step {step}: no autopsy, because there is too little memory", step)
        except Exception as error:
            if runtime.world_size > 1:  # the other ranks wait for this one's part of a sum
                raise
            run.tracker.log_event("autopsy", f"step {step}: no autopsy ({describe(error)})", step)
        finally:
            put_back(model, kept)
            restore_random_state(random)
        return result

    def rerun_all(self, problem: str, recorded: Numbers) -> tuple[Evidence, list[Tensor | None]]:
        """Return what the reruns found, and the gradients of the first one."""
        run, runtime, progress = self.run, self.run.runtime, self.progress
        z_loss = run.config.training.z_loss
        again = rerun(run.prepared, self.micro_batches, runtime, z_loss=z_loss)
        clean = take_gradients(run.prepared)
        full = None
        if runtime.precision.name != "float32" and not runtime.layout.is_sharded:  # FSDP gathers the weights in 16 bits
            with in_float32(run) as exact:
                full = rerun(run.prepared, self.micro_batches, exact, z_loss=z_loss)
        before = None
        if progress.step:
            share = len(run.batches.window_ids(0)) // runtime.world_size
            first = runtime.rank * share
            batch = run.batches.read(progress.step - 1, first, first + share)
            before = rerun(run.prepared, split(batch, self.size, runtime), runtime, z_loss=z_loss)
        is_exact = runtime.device.type == "cpu" or run.config.training.deterministic
        is_transient = runtime.highest(not recorded.equals(again, is_exact=is_exact)) > 0
        evidence = Evidence(
            step=progress.step + 1,
            problem=problem,
            recorded=recorded,
            again=again,
            float32=full,
            before=before,
            losses=progress.losses,
            norms=progress.norms,
            rates=progress.rates,
            precision=runtime.precision.name,
            is_transient=is_transient,
        )
        return weigh(evidence), clean


def rerun(model: torch.nn.Module, micro_batches: Sequence[MicroBatch], runtime: Runtime, *, z_loss: float) -> Numbers:
    """Return the loss and the gradient norm of a batch on the present weights, computed as a step does; all ranks call it."""
    model.zero_grad(set_to_none=True)
    loss, _ = accumulate_gradients(model, micro_batches, runtime, z_loss=z_loss)
    if runtime.scaler.is_enabled():  # unscale_ itself may be called only once a step
        torch._foreach_mul_(gradients_of(model), 1 / runtime.scaler.get_scale())
    return Numbers(*read_numbers(model, loss))


@contextlib.contextmanager
def in_float32(run: Run) -> Iterator[Runtime]:
    """Yield a runtime that computes in float32; the attention backend is one for float32 inside the `with` block."""
    runtime, inner = run.runtime, run.model.model
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=False)
    backend, matmul = inner.attention_backend, torch.get_float32_matmul_precision()
    isolates = run.config.data.document_mask
    try:
        torch.set_float32_matmul_precision("highest")
        inner.attention_backend = choose_backend(
            "auto", runtime.device.type, torch.float32, device_features(runtime.device), isolates=isolates
        )
        with torch.compiler.set_stance("force_eager"):
            yield dataclasses.replace(runtime, precision=Precision("float32", "of an autopsy"), scaler=scaler)
    finally:
        inner.attention_backend = backend
        torch.set_float32_matmul_precision(matmul)


def take_gradients(model: torch.nn.Module) -> list[Tensor | None]:
    """Return the gradients and take them from the model; DistributedDataParallel would write the next ones over them."""
    is_wrapped = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    taken = [p.grad.clone() if is_wrapped and p.grad is not None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken


def put_back(model: torch.nn.Module, gradients: Sequence[Tensor | None]) -> None:
    """Give the parameters these gradients."""
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
