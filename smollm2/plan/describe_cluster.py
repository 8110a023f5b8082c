"""The rows that `smollm2 plan --devices N --machines M` adds to its table: memory, sharding and time on several devices."""

import re
from dataclasses import replace

from smollm2.config.schema import Config
from smollm2.formatting import format_bytes, format_estimate, format_step_time
from smollm2.plan.describe import CARDS, with_counted_vocabulary
from smollm2.plan.machine import Machine, memory_limit
from smollm2.plan.scale import (
    MAX_MEMORY_SHARE,
    SHARDINGS,
    Cluster,
    choose_sharding,
    cluster_memory,
    estimate_cluster_step,
    fits,
    join_devices,
    links_of,
    micro_batches,
    nearest_batches,
    spread_batch,
)
from smollm2.plan.throughput import estimate_duration, find_throughput


def find_memory(machine: Machine, cluster: Cluster) -> int | None:
    """Return the bytes of memory of one device here; None for a GPU that is in no table. CPU processes share theirs."""
    if not has_gpu(machine):
        return memory_limit() // cluster.devices
    if named := re.search(r"\b(\d+) ?GB\b", machine.device):
        return int(named[1]) * 10**9
    return next((size * 10**9 for card, size in CARDS.items() if re.search(rf"\b{card}\b", machine.device)), None)


def has_gpu(machine: Machine) -> bool:
    """Return whether the machine computes on a GPU with memory of its own."""
    return not machine.is_cpu and machine.device != "mps"


def describe_cluster(
    config: Config, machine: Machine, cluster: Cluster, memory_bytes: int | None
) -> list[tuple[str, str]]:
    """Return the rows as (label, text): for devices as in `machine`, each with `memory_bytes`, and for common GPUs."""
    config = with_counted_vocabulary(config)
    machines = {"time here": (machine, memory_bytes)}
    machines |= {f"time on {card}": (Machine(card, cores=1), size * 10**9) for card, size in CARDS.items()}
    return [
        ("cluster", describe_size(cluster)),
        ("  global batch", describe_batch(config, cluster)),
        *((f"  {name}", describe_memory(config, machine, cluster, name, memory_bytes)) for name in SHARDINGS),
        *((f"  {name}", describe_time(config, one, cluster, size)) for name, (one, size) in machines.items()),
        ("  links", describe_links(machine, cluster)),
    ]


def describe_size(cluster: Cluster) -> str:
    """Return the number of devices and machines."""
    devices = "1 device" if cluster.devices == 1 else f"{cluster.devices:,} devices"
    if cluster.machines == 1:
        return f"1 machine with {devices}"
    return f"{cluster.machines:,} machines with {devices} each, {cluster.world:,} together"


def describe_batch(config: Config, cluster: Cluster) -> str:
    """Return how the devices share the sequences of a step; if they cannot, the nearest numbers of sequences."""
    sequences = nearest_batches(config.global_batch_size, cluster.world)
    count, size = micro_batches(config, cluster), spread_batch(config, cluster).training.batch_size
    parts = "one micro-batch" if count == 1 else f"{count:,} micro-batches of at most {size:,}"
    share = f"{sequences[0] // cluster.world:,} for each device, in {parts}"
    if sequences[0] == config.global_batch_size:
        return f"{sequences[0]:,} sequences: {share}"
    nearest = " or ".join(f"{number:,}" for number in sequences)
    return (
        f"{config.global_batch_size:,} sequences, which {cluster.world:,} devices cannot share equally; the nearest "
        f"possible size is {nearest}. The rows below are for {sequences[0]:,}: {share}"
    )


def describe_memory(config: Config, machine: Machine, cluster: Cluster, sharding: str, memory_bytes: int | None) -> str:
    """Return the memory of each device with this sharding, and which devices have as much."""
    if sharding == "hybrid" and cluster.machines == 1:
        return "on one machine the same as full"
    on_gpu = cluster_memory(config, "H100", cluster, sharding)
    cards = ", ".join(card for card, size in CARDS.items() if fits(on_gpu, size * 10**9))
    text = f"{format_bytes(on_gpu.total)} for each GPU: fits {cards or 'none of the GPUs below'}"
    if has_gpu(machine) or memory_bytes is None:
        return text
    here = cluster_memory(config, machine.device, cluster, sharding)
    verdict = "fits" if fits(here, memory_bytes) else "does not fit"
    return f"{text}; {format_bytes(here.total)} of {format_bytes(memory_bytes)} for each process here: {verdict}"


def describe_time(config: Config, machine: Machine, cluster: Cluster, memory_bytes: int | None) -> str:
    """Return which sharding the run would have on a cluster of these devices, and how long it would take."""
    sharding, reason = find_sharding(config, machine, cluster, memory_bytes)
    memory = cluster_memory(config, machine.device, cluster, sharding)
    if memory_bytes is not None and not fits(memory, memory_bytes):
        limit = f"{MAX_MEMORY_SHARE:.0%} of {format_bytes(memory_bytes)}"
        needed = f"{format_bytes(memory.total)} with sharding {sharding}"
        return f"does not fit: {needed}, more than {limit}; lower training.batch_size"
    links, throughput = links_of(machine.device, cluster), find_throughput(config, machine)
    step = estimate_cluster_step(config, machine, cluster, sharding, links, throughput)
    duration = estimate_duration(spread_batch(config, cluster), join_devices(machine, cluster), throughput)
    seconds = replace(duration, step=step.total).total
    return (
        f"about {format_estimate(seconds)} ({format_step_time(step.total)}), {step.communication_share:.0%} of it "
        f"waiting for communication; sharding {sharding} ({reason})"
    )


def find_sharding(config: Config, machine: Machine, cluster: Cluster, memory_bytes: int | None) -> tuple[str, str]:
    """Return the sharding that the run would have, and why."""
    if config.training.sharding != "auto":
        return config.training.sharding, "as set"
    if memory_bytes is None:
        return "none", "assumed, because the memory of this GPU is unknown"
    sharding = choose_sharding(config, machine.device, memory_bytes, cluster)
    return sharding, "auto: no sharding is needed" if sharding == "none" else "auto: without sharding it does not fit"


def describe_links(machine: Machine, cluster: Cluster) -> str:
    """Return the assumed speeds of the links of each kind of device."""
    devices = {"here": machine.device, **{card: card for card in CARDS}}
    speeds = {name: links_of(device, cluster) for name, device in devices.items()}
    text = ", ".join(f"{name} {links.within / 1e9:.3g} / {links.between / 1e9:.3g}" for name, links in speeds.items())
    return f"assumed GB/s of each device, within / between machines: {text}"
