"""Several devices: which sharding a run needs, the memory of each device, and the time that communication takes.

`none` is DDP: every device has the whole model. `full` splits weights, gradients and optimizer state over all devices.
`hybrid` splits them over the devices of one machine, and every machine has the whole model.
"""

import math
from dataclasses import dataclass, replace

from smollm2.config.schema import Config
from smollm2.plan.arithmetic import Memory, count_block, count_parameters, estimate_memory, needs_float32
from smollm2.plan.machine import Machine
from smollm2.plan.throughput import Throughput, estimate_step

SHARDINGS = ("none", "hybrid", "full")

MAX_MEMORY_SHARE = 0.9
"""The part of a device's memory that `auto` uses at most; the rest is for NCCL's buffers and the allocator's gaps."""

# Peak bytes per second of one device in one direction, from data sheets. Data sheets of NVLink add both directions.
NVLINK_4 = 450e9  # H100 and H200 SXM: 900 GB/s in both directions (NVIDIA H100 data sheet)
NVLINK_3 = 300e9  # A100 SXM: 600 GB/s in both directions (NVIDIA A100 data sheet)
PCIE_4 = 32e9  # 16 lanes of 16 GT/s (PCI-SIG, PCI Express 4.0)
INFINIBAND_NDR = 50e9  # 400 Gb/s, one ConnectX-7 for each GPU of a DGX H100 (NVIDIA DGX H100 data sheet)
INFINIBAND_HDR = 25e9  # 200 Gb/s, one ConnectX-6 for each GPU of a DGX A100 (NVIDIA DGX A100 data sheet)
ETHERNET_100G = 12.5e9  # 100 Gb/s (IEEE 802.3ba)
GLOO = 1e9  # CPU processes on one machine, which use TCP: a guess, never measured


@dataclass(frozen=True)
class Cluster:
    """Equal machines that train one model together."""

    machines: int
    devices: int  # per machine

    @property
    def world(self) -> int:
        """The number of devices in all machines."""
        return self.machines * self.devices


@dataclass(frozen=True)
class Links:
    """Bytes per second that one device can send, and receive at the same time."""

    within: float  # to the devices of the same machine
    between: float  # to other machines


@dataclass(frozen=True)
class ClusterStep:
    """The seconds of one step on each device."""

    compute: float
    communication: float
    exposed: float  # the part of communication during which the device does not compute

    @property
    def total(self) -> float:
        """The seconds of the whole step."""
        return self.compute + self.exposed

    @property
    def communication_share(self) -> float:
        """The part of the step, from 0 to 1, in which the device only waits for communication."""
        return self.exposed / self.total


def shards_of(sharding: str, cluster: Cluster) -> int:
    """Return over how many devices the model is split. Raise KeyError if `sharding` is none of SHARDINGS."""
    return {"none": 1, "hybrid": cluster.devices, "full": cluster.world}[sharding]


def nearest_batches(global_batch: int, world: int) -> list[int]:
    """Return the numbers of sequences nearest to `global_batch` that `world` devices can share equally, nearest first.

    It is one number if they can share `global_batch` itself.
    """
    lower = global_batch // world * world
    if lower == global_batch:
        return [global_batch]
    return sorted((size for size in (lower, lower + world) if size), key=lambda size: abs(size - global_batch))


def spread_batch(config: Config, cluster: Cluster) -> Config:
    """Return the config with the micro-batches of the cluster: as few as batch_size allows on each device.

    The global batch is the nearest that the devices can share equally. Micro-batches of one size stand for those of a
    run, whose last one may be smaller.
    """
    share = nearest_batches(config.global_batch_size, cluster.world)[0] // cluster.world
    count = math.ceil(share / config.training.batch_size)
    return config.with_training(batch_size=math.ceil(share / count), gradient_accumulation_steps=count * cluster.world)


def cluster_memory(config: Config, device: str, cluster: Cluster, sharding: str) -> Memory:
    """Return the peak memory of each device; `device` is as in `estimate_memory`, `sharding` as in `shards_of`."""
    return estimate_memory(spread_batch(config, cluster), device, shards_of(sharding, cluster))


def choose_sharding(config: Config, device: str, memory_bytes: int, cluster: Cluster) -> str:
    """Return the sharding for `auto`: the first of none, hybrid and full that fits into `memory_bytes` of each device.

    A run fits if it needs at most 90 % of the memory. If nothing fits, or hybrid would be the same as full because there
    is one machine, it is full; one device always has none.
    """
    if cluster.world == 1:
        return "none"
    for sharding in ("none", "hybrid") if cluster.machines > 1 else ("none",):
        if fits(cluster_memory(config, device, cluster, sharding), memory_bytes):
            return sharding
    return "full"


def fits(memory: Memory, memory_bytes: int) -> bool:
    """Return whether a run that needs `memory` may use a device with this many bytes."""
    return memory.total <= MAX_MEMORY_SHARE * memory_bytes


def communication_seconds(config: Config, device: str, cluster: Cluster, sharding: str, links: Links) -> float:
    """Return the seconds of all communication of one step, from the bytes alone: latency is ignored.

    With S bytes and n devices of B bytes per second, a ring takes 2 (n - 1)/n S/B for an all-reduce, and (n - 1)/n S/B
    for an all-gather or a reduce-scatter (Patarasuk and Yuan, 2009; NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    - none: one all-reduce of the gradients in float32.
    - full and hybrid, in each micro-batch: two all-gathers of every block (forward, backward) and one of the root group,
      in the dtype of the matrix products, and a reduce-scatter of the gradients in float32. With hybrid also an
      all-reduce, between machines, of the gradients that each device then has.
    """
    gradients = 4 * count_parameters(config.model)
    if sharding == "none":
        return 2 * ring_seconds(gradients, cluster, links)
    blocks = config.model.num_hidden_layers * count_block(config.model)
    size = 4 if needs_float32(config, device) else 2
    gathered = size * (count_parameters(config.model) + blocks)
    if sharding == "full":
        seconds = ring_seconds(gathered + gradients, cluster, links)
    else:
        seconds = ring_seconds(gathered + gradients, replace(cluster, machines=1), links)
        between = Cluster(cluster.machines, 1)
        seconds += 2 * ring_seconds(gradients / cluster.devices, between, links)
    return seconds * micro_batches(config, cluster)


def ring_seconds(size: float, cluster: Cluster, links: Links) -> float:
    """Return the seconds of an all-gather or a reduce-scatter of `size` bytes; an all-reduce takes twice as long.

    It is a ring within each machine, and for each device's part a ring between machines, one after the other.
    """
    n, m = cluster.devices, cluster.machines
    return (n - 1) / n * size / links.within + (m - 1) / m * size / n / links.between


def micro_batches(config: Config, cluster: Cluster) -> int:
    """Return how many micro-batches each device processes in a step."""
    return spread_batch(config, cluster).training.gradient_accumulation_steps // cluster.world


def estimate_cluster_step(
    config: Config, machine: Machine, cluster: Cluster, sharding: str, links: Links, throughput: Throughput
) -> ClusterStep:
    """Return the time of one step on a cluster of devices such as those of `machine`; `throughput` is of one of them.

    Communication overlaps with the backward pass, with `none` only with that of the last micro-batch; the rest of it is
    exposed. A backward pass is 2/3 of the compute time, or 3/4 with gradient checkpointing.
    """
    compute = estimate_step(spread_batch(config, cluster), join_devices(machine, cluster), throughput)
    communication = communication_seconds(config, machine.device, cluster, sharding, links)
    backward = compute * (3 / 4 if config.training.gradient_checkpointing else 2 / 3)
    overlapping = backward / micro_batches(config, cluster) if sharding == "none" else backward
    return ClusterStep(compute, communication, max(0.0, communication - overlapping))


def join_devices(machine: Machine, cluster: Cluster) -> Machine:
    """Return a cluster of such machines as one; processes on a CPU share its cores, so they count as one device."""
    return replace(machine, devices=cluster.machines if machine.is_cpu else cluster.world)


def links_of(device: str, cluster: Cluster) -> Links:
    """Return the published link speeds of a device; `device` is as in `estimate_memory`.

    GPUs without NVLink share one 100 Gb/s port per machine, and so do CPU processes.
    """
    if "H100" in device or "H200" in device:
        return Links(NVLINK_4, INFINIBAND_NDR)
    if "A100" in device:
        return Links(NVLINK_3, INFINIBAND_HDR)
    return Links(GLOO if device.startswith(("cpu", "mps")) else PCIE_4, ETHERNET_100G / cluster.devices)
