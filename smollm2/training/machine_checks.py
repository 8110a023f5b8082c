"""Checks of the machine and of the run folder: what the run needs, and whether it is there."""

import torch

from smollm2.analysis.checks import Finding, judge, passed, skipped
from smollm2.errors import ResourceError
from smollm2.formatting import format_bytes, format_estimate
from smollm2.model.attention import check_backend
from smollm2.plan.describe import make_plan
from smollm2.plan.machine import count_cores
from smollm2.plan.scale import cluster_memory
from smollm2.runtime.ranks import find_odd_replica, weight_sums
from smollm2.runtime.throughput import cluster_of, machine_of, memory_of
from smollm2.storage.atomic import probe_folder
from smollm2.training.setup import Run, check_disk


def check_attention(run: Run) -> Finding:
    """Compare the attention backend with the formula in float64, forwards and backwards, with the run's heads."""
    m, runtime, backend = run.config.model, run.runtime, run.model.model.attention_backend
    heads = (m.num_attention_heads, m.num_key_value_heads, m.head_dim)
    isolates = run.config.data.document_mask
    problem = check_backend(backend, runtime.device, runtime.precision.dtype, heads, isolates=isolates)
    return judge(not problem, problem or "", "choose another training.attention", evidence={"backend": backend})


def check_folder(run: Run) -> Finding:
    """Write a file to the run folder, and compare the free space with all checkpoints of the run."""
    try:
        probe_folder(run.folder)
        check_disk(run.config, run.folder)
    except ResourceError as error:
        return Finding("fail", {}, str(error), "")
    plan = make_plan(run.config, machine_of(run.runtime))
    return passed({"checkpoints": format_bytes(plan.disk.total)})


def check_resources(run: Run) -> Finding:
    """Compare the estimated memory with that of the device, and estimate the time."""
    machine, layout = machine_of(run.runtime), run.runtime.layout
    plan, available = make_plan(run.config, machine), memory_of(run.runtime)
    sharding = run.config.training.sharding if layout.is_sharded else "none"
    memory = cluster_memory(run.config, machine.device, cluster_of(run.runtime), sharding).total
    return judge(
        memory <= available,
        "the run may not fit into memory",
        "lower training.batch_size and raise training.gradient_accumulation_steps",
        warns=True,
        evidence={
            "memory": format_bytes(memory),
            "of": format_bytes(available),
            "time": format_estimate(plan.duration.of(run.config.training.train_steps - run.resumed_step)),
        },
    )


def check_threads(run: Run) -> Finding:
    """Compare torch's threads with the cores that this process may use."""
    if run.runtime.device.type != "cpu":
        return skipped("the run computes on a GPU")
    local = cluster_of(run.runtime).devices
    threads, cores = torch.get_num_threads() * local, count_cores()
    return judge(
        threads <= cores,
        "there are more threads than cores, and they wait for one another",
        f"set OMP_NUM_THREADS to {max(1, cores // local)}",
        warns=True,
        evidence={"threads": threads, "cores": cores},
    )


def check_ranks(run: Run) -> Finding:
    """Compare the weights of all ranks; their config, code and data were compared when they started."""
    layout = run.runtime.layout
    if run.runtime.world_size == 1:
        return skipped("there is one process")
    sums = run.runtime.gather(weight_sums(run.model).tolist())
    odd = [found for part in range(layout.shards) if (found := find_odd_replica(sums[part :: layout.shards]))]
    return judge(
        not odd,
        "the ranks begin with different weights",
        "start every rank with the same code, flags and files",
        evidence={"ranks": run.runtime.world_size},
    )
