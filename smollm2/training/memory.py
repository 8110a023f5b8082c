"""How many sequences a rank processes at once."""

from typing import cast

from smollm2.config.schema import Config
from smollm2.errors import (
    ResourceError,
)
from smollm2.formatting import format_bytes
from smollm2.plan import arithmetic as plan
from smollm2.plan.machine import memory_limit
from smollm2.runtime.device import (
    environment,
)
from smollm2.training.setup import Run
from smollm2.training.step import (
    micro_batch_size,
    smaller_micro_batch,
)


def choose_micro_batch(run: Run) -> int:
    """Sequences in one forward pass. On a CPU, which Linux relieves by killing, `plan`'s memory decides beforehand.

    Raises ResourceError where not even one sequence fits.
    """
    config, runtime = run.config, run.runtime
    t, share = config.training, config.global_batch_size // runtime.world_size
    size: int | None = micro_batch_size(config.global_batch_size, runtime.world_size, t.batch_size)
    limit = memory_limit()
    if runtime.device.type != "cpu":
        return cast(int, size)
    processes = int(environment().get("LOCAL_WORLD_SIZE", "1"))

    def needed(size: int) -> int:
        smaller = config.model_copy(update={"training": t.model_copy(update={"batch_size": size})})
        return processes * plan.estimate_memory(smaller, runtime.planned_device).total

    asked = cast(int, size)
    while size and needed(size) > limit:
        size = smaller_micro_batch(share, size)
    if not size:
        raise ResourceError(
            f"{describe_out_of_memory(config, 1)}: {format_bytes(needed(1))} are needed, and this machine has "
            f"{format_bytes(limit)}"
        )
    if size < asked:
        run.tracker.log_event(
            "micro_batch",
            f"training.batch_size: {asked} sequences at once need about {format_bytes(needed(asked))} and this machine has "
            f"{format_bytes(limit)}; {size} at once, as many an update",
            run.resumed_step,
        )
    return size


def describe_out_of_memory(config: Config, size: int) -> str:
    """What to set where the memory does not suffice for micro-batches of `size`."""
    if size > 1:
        return f"set training.batch_size {size} and training.gradient_accumulation_steps {config.global_batch_size // size}"
    return (
        f"training.batch_size: {config.training.batch_size} - out of memory even with one sequence at once - set "
        "training.gradient_checkpointing true, a shorter training.sequence_length or a smaller model"
    )
