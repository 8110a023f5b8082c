"""How many sequences a rank processes in one forward pass, and what happens if memory runs out."""

import math
from dataclasses import dataclass

import torch

from smollm2.config.schema import Config
from smollm2.errors import ConfigError, ResourceError
from smollm2.formatting import format_bytes
from smollm2.plan.arithmetic import estimate_memory
from smollm2.plan.machine import memory_limit
from smollm2.plan.scale import nearest_batches
from smollm2.runtime.device import Runtime, environment

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
"""How CUDA, cuBLAS, cuDNN and torch's CPU allocator describe a failed allocation."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is a failed allocation, for which cuBLAS and the CPU allocator raise a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def micro_batch_size(global_batch: int, world_size: int, batch_size: int) -> int:
    """Return the size of a rank's largest micro-batch.

    The rank's share of the global batch is split into as few nearly equal parts as `batch_size` allows. Raise
    ConfigError, naming the nearest global batch that divides, if the ranks cannot share the global batch equally.
    """
    if global_batch % world_size:
        nearest = " or ".join(map(str, sorted(nearest_batches(global_batch, world_size))))
        raise ConfigError(
            "training.batch_size",
            f"the global batch (batch_size x gradient_accumulation_steps) is {global_batch} sequences, which "
            f"{world_size} devices cannot share equally",
            f"the nearest possible size is {nearest}",
        )
    share = global_batch // world_size
    return largest_part(share, batch_size)


def smaller_micro_batch(share: int, size: int) -> int | None:
    """Return the next micro-batch size to try when memory has run out, at most half of `size`; None below 1."""
    return largest_part(share, size // 2) if size > 1 else None


def largest_part(share: int, limit: int) -> int:
    """Return the size of the largest of as few nearly equal parts of `share` sequences as `limit` allows."""
    return math.ceil(share / math.ceil(share / limit))


@dataclass(frozen=True)
class MicroBatchChoice:
    """The number of sequences in one forward pass, and the reason if it is lower than training.batch_size allows."""

    size: int
    reason: str = ""


def choose_micro_batch(config: Config, runtime: Runtime) -> MicroBatchChoice:
    """Return how many sequences to process at once.

    On a CPU, the memory estimate of `smollm2 plan` decides, because Linux would kill a run that needs too much. Raise
    ResourceError if not even one sequence fits.
    """
    t, share = config.training, config.global_batch_size // runtime.world_size
    allowed = micro_batch_size(config.global_batch_size, runtime.world_size, t.batch_size)
    limit = memory_limit()
    if runtime.device.type != "cpu":
        return MicroBatchChoice(allowed)
    processes = int(environment().get("LOCAL_WORLD_SIZE", "1"))

    def needed(size: int) -> int:
        smaller = config.with_training(batch_size=size)
        return processes * estimate_memory(smaller, runtime.planned_device, runtime.layout.shards).total

    size: int | None = allowed
    while size and needed(size) > limit:
        size = smaller_micro_batch(share, size)
    if not size:
        raise no_room_for_one_sequence(
            config, f" ({format_bytes(needed(1))} is needed, but this machine has {format_bytes(limit)})"
        )
    if size == allowed:
        return MicroBatchChoice(size)
    numbers = f" need about {format_bytes(needed(allowed))} and this machine has {format_bytes(limit)}"
    return MicroBatchChoice(size, describe_smaller(config, allowed, size, numbers))


def describe_smaller(config: Config, allowed: int, size: int, numbers: str = " do not fit into memory") -> str:
    """Return why a run processes only `size` sequences at once."""
    return (
        f"training.batch_size: {allowed} sequences at once{numbers}. Processing {size} at once; the step keeps its "
        f"{config.global_batch_size} sequences."
    )


def no_room_for_one_sequence(config: Config, numbers: str = "") -> ResourceError:
    """Return the error for a run in which not even one sequence fits into memory."""
    return ResourceError(
        "training.batch_size",
        f"{config.training.batch_size} is too large: out of memory even with one sequence at a time{numbers}",
        "set training.gradient_checkpointing to true, or use a shorter training.sequence_length or a smaller model",
    )


def describe_smaller_batch(config: Config, size: int) -> str:
    """Describe the settings that start a run with micro-batches of at most `size` and the same global batch."""
    total = config.global_batch_size
    divisor = max(n for n in range(1, size + 1) if total % n == 0)
    return f"set training.batch_size {divisor} and training.gradient_accumulation_steps {total // divisor}"
