"""A simulation, not a measurement: the step time of SmolLM2's presets on 1 to 1,024 GPUs, 8 in each machine.

Compute comes from the table of `smollm2 plan`, communication from ring formulas and published link speeds
(smollm2/plan/scale.py). Nothing here needs a GPU, and it takes seconds.

    python benchmarks/scale.py
"""

import argparse
import time
from dataclasses import asdict, dataclass

from results import publish

from smollm2.config.reading import load_config
from smollm2.plan.describe import CARDS
from smollm2.plan.machine import Machine
from smollm2.plan.scale import (
    ETHERNET_100G,
    SHARDINGS,
    Cluster,
    Links,
    choose_sharding,
    cluster_memory,
    estimate_cluster_step,
    links_of,
    spread_batch,
)
from smollm2.plan.throughput import GPU_FLOPS, GPU_SECONDS_PER_BLOCK, table_throughput

PRESETS = ["smollm2-135m", "smollm2-360m", "smollm2-1.7b"]
COUNTS = [1, 8, 16, 64, 256, 1024]
IN_ONE_MACHINE = 8


@dataclass(frozen=True)
class Result:
    """One preset on one number of devices with one sharding."""

    preset: str
    devices: int
    machines: int
    network: str
    sharding: str
    sequences: int  # in one step, on all devices
    memory_bytes: int  # of each device
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    step_seconds: float
    tokens_per_second: float  # of all devices


def make_cluster(devices: int) -> Cluster:
    """Return the cluster with so many devices: one machine up to 8, then machines with 8 each."""
    if devices > IN_ONE_MACHINE and devices % IN_ONE_MACHINE:
        raise SystemExit(f"--devices: {devices} is not a multiple of {IN_ONE_MACHINE}")
    within = min(devices, IN_ONE_MACHINE)
    return Cluster(devices // within, within)


def list_networks(card: str, cluster: Cluster) -> dict[str, Links]:
    """Return the networks to compare: the card's usual one, and Ethernet; one machine has none."""
    usual = links_of(card, cluster)
    if cluster.machines == 1:
        return {"-": usual}
    slow = Links(usual.within, ETHERNET_100G / cluster.devices)
    return {f"{links.between * 8 * cluster.devices / 1e9:,.0f} Gb/s": links for links in (usual, slow)}


def simulate(preset: str, card: str, cluster: Cluster, sharding: str, network: str) -> Result:
    """Return the step of a preset on a cluster of this card."""
    config, machine, links = load_config(preset=preset), Machine(card, cores=1), list_networks(card, cluster)[network]
    step = estimate_cluster_step(config, machine, cluster, sharding, links, table_throughput(config, machine))
    spread = spread_batch(config, cluster)
    tokens = spread.global_batch_size * spread.training.sequence_length
    return Result(
        preset=preset,
        devices=cluster.world,
        machines=cluster.machines,
        network=network,
        sharding=sharding,
        sequences=spread.global_batch_size,
        memory_bytes=cluster_memory(config, card, cluster, sharding).total,
        compute_seconds=step.compute,
        communication_seconds=step.communication,
        exposed_seconds=step.exposed,
        step_seconds=step.total,
        tokens_per_second=tokens / step.total,
    )


def make_row(found: list[Result], card: str, cluster: Cluster) -> list[str]:
    """Return the row of one preset, number of devices and network, from its results with each sharding."""
    first = found[0]
    config = load_config(preset=first.preset)
    auto = choose_sharding(config, card, CARDS[card] * 10**9, cluster)
    chosen = found[SHARDINGS.index(auto)]
    alone = simulate(first.preset, card, Cluster(1, 1), "none", "-")
    row = [first.preset, f"{first.devices:,}", first.network, f"{first.sequences:,}", f"{first.compute_seconds:.3f}"]
    for result in found:
        communication, exposed = 1000 * result.communication_seconds, 1000 * result.exposed_seconds
        row += [f"{result.memory_bytes / 1e9:.1f}", f"{communication:,.0f} ({exposed:,.0f})"]
    efficiency = chosen.tokens_per_second / first.devices / alone.tokens_per_second
    return [*row, auto, f"{chosen.tokens_per_second / 1e6:.2f}", f"{efficiency:.0%}"]


def describe_assumptions(card: str) -> list[str]:
    """Return what the figures depend on, as sentences."""
    links = links_of(card, Cluster(2, IN_ONE_MACHINE))
    return [
        f"Nothing was measured: one {card} computes at {GPU_FLOPS[card] / 1e12:.0f} TFLOP/s, an estimate in "
        "smollm2/plan/throughput.py, at any size of the micro-batch.",
        f"A block takes at least {1000 * GPU_SECONDS_PER_BLOCK:.0f} ms in each micro-batch, which limits small "
        "micro-batches; this is an estimate too.",
        f"Links run at the peak of their data sheets, in each direction: {links.within / 1e9:.0f} GB/s of each device "
        f"within a machine, and for the whole machine {links.between * 8 * IN_ONE_MACHINE / 1e9:,.0f} or 100 Gb/s.",
        "Collectives are rings within a machine, then between machines; latency is ignored, which favours many devices.",
        "Communication overlaps with the backward pass; with sharding none, with that of the last micro-batch.",
        "The global batch is that of the preset, or the nearest that the devices can share equally.",
        "Every device is equally fast; reading, saving and the optimizer take no time.",
    ]


def main() -> None:
    """Simulate every preset, number of devices and sharding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--devices", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--card", choices=[card for card in CARDS if card in GPU_FLOPS], default="H100")
    args = parser.parse_args()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    for preset in args.presets:
        for cluster in map(make_cluster, args.devices):
            for network in list_networks(args.card, cluster):
                found = [simulate(preset, args.card, cluster, sharding, network) for sharding in SHARDINGS]
                rows.append(make_row(found, args.card, cluster))
                results += [asdict(result) for result in found]
    columns = ["preset", "devices", "between machines", "sequences per step", "compute, s"]
    for sharding in SHARDINGS:
        columns += [f"{sharding}: GB", "communication, ms (exposed)"]
    columns += ["auto", "M tokens/s", "of linear"]
    assumptions = describe_assumptions(args.card)
    print("\n".join(assumptions))
    simulated = {"simulated": f"{args.card}s with {IN_ONE_MACHINE} in each machine", "date": time.strftime("%Y-%m-%d")}
    publish(__file__, columns, rows, machine=simulated, assumptions=assumptions, results=results)


if __name__ == "__main__":
    main()
