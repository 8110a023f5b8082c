"""Several devices: the memory of each, the choice of the sharding, and the seconds of rings counted by hand."""

import pytest
from plans import NANO, small_run, user_config

from smollm2.config.reading import load_config
from smollm2.plan.arithmetic import estimate_memory
from smollm2.plan.machine import Machine
from smollm2.plan.scale import (
    ETHERNET_100G,
    INFINIBAND_NDR,
    NVLINK_4,
    SHARDINGS,
    Cluster,
    ClusterStep,
    Links,
    choose_sharding,
    cluster_memory,
    communication_seconds,
    estimate_cluster_step,
    links_of,
    micro_batches,
    nearest_batches,
    shards_of,
    spread_batch,
)
from smollm2.plan.throughput import table_throughput

LARGE = load_config(preset="smollm2-1.7b")
PARAMETERS = 1_711_376_384
BLOCK = (1_610_713_088 - 2048) // 24
ROOT = 49_152 * 2048 + 2048
H100 = Machine("NVIDIA H100", 8)
ONE = Cluster(1, 1)


@pytest.mark.parametrize(
    ("sharding", "cluster", "shards"),
    [
        ("none", Cluster(4, 8), 1),
        ("hybrid", Cluster(4, 8), 8),
        ("full", Cluster(4, 8), 32),
        ("hybrid", Cluster(1, 8), 8),
        ("hybrid", Cluster(8, 1), 1),
        ("full", ONE, 1),
    ],
)
def test_shards_are_counted_over_one_machine_or_all(sharding: str, cluster: Cluster, shards: int) -> None:
    assert shards_of(sharding, cluster) == shards


@pytest.mark.parametrize(
    ("batch", "world", "nearest"),
    [(48, 16, [48]), (48, 7, [49, 42]), (512, 60, [540, 480]), (48, 64, [64]), (50, 20, [40, 60]), (1, 1, [1])],
)
def test_the_nearest_batches_are_multiples_of_the_number_of_devices(batch: int, world: int, nearest: list[int]) -> None:
    assert nearest_batches(batch, world) == nearest


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "cluster", "size", "count"),
    [
        (12, 4, ONE, 12, 4),
        (12, 4, Cluster(2, 8), 3, 1),
        (8, 64, Cluster(1, 8), 8, 8),
        (8, 9, Cluster(1, 8), 5, 2),
        (12, 4, Cluster(8, 8), 1, 1),
    ],
)
def test_each_device_has_as_few_micro_batches_as_batch_size_allows(
    batch_size: int, accumulation: int, cluster: Cluster, size: int, count: int
) -> None:
    config = small_run(NANO, batch_size, accumulation)
    assert spread_batch(config, cluster).training.batch_size == size
    assert micro_batches(config, cluster) == count


@pytest.mark.parametrize(("device", "size"), [("NVIDIA H100", 2), ("cpu-avx2", 4)])
def test_a_device_gathers_the_root_group_and_two_blocks_beside_its_shard(device: str, size: int) -> None:
    memory = estimate_memory(LARGE, device, shards=8)
    assert memory.weights == PARAMETERS // 8 * 4 + size * (ROOT + 2 * BLOCK)
    assert memory.gradients == PARAMETERS // 8 * 4
    assert memory.optimizer == PARAMETERS // 8 * 8


def test_a_model_of_one_block_gathers_all_of_it() -> None:
    config = small_run({**NANO, "num_hidden_layers": 1}, 1, 1)
    whole, shared = (estimate_memory(config, "cpu-avx2", shards).weights for shards in (1, 10**9))
    assert shared == pytest.approx(whole, abs=1)


def test_sharding_leaves_activations_and_loss_as_they_are() -> None:
    whole, shared = (estimate_memory(LARGE, "NVIDIA H100", shards) for shards in (1, 8))
    assert (whole.activations, whole.loss) == (shared.activations, shared.loss)


def test_memory_of_a_device_falls_with_the_number_of_its_shards() -> None:
    none, hybrid, full = (cluster_memory(LARGE, "H100", Cluster(8, 8), name).total for name in SHARDINGS)
    assert none > hybrid > full


@pytest.mark.parametrize(
    ("cluster", "gigabytes", "sharding"),
    [
        (Cluster(8, 8), 80, "none"),
        (Cluster(8, 8), 48, "hybrid"),
        (Cluster(8, 8), 27, "full"),
        (Cluster(8, 8), 1, "full"),
        (Cluster(1, 8), 48, "full"),
        (Cluster(8, 1), 48, "full"),
        (ONE, 48, "none"),
    ],
)
def test_auto_takes_the_first_sharding_that_fits(cluster: Cluster, gigabytes: int, sharding: str) -> None:
    """smollm2-1.7b needs 53.1 GB whole, 26.2 GB split over 8 devices and 23.2 GB over 64."""
    assert choose_sharding(LARGE, "NVIDIA H100", gigabytes * 10**9, cluster) == sharding


@pytest.mark.parametrize(("share", "sharding"), [(0.89, "none"), (0.91, "full")])
def test_auto_leaves_a_tenth_of_the_memory(share: float, sharding: str) -> None:
    needed = cluster_memory(LARGE, "NVIDIA H100", Cluster(1, 2), "none").total
    assert choose_sharding(LARGE, "NVIDIA H100", int(needed / share), Cluster(1, 2)) == sharding


LINKS = Links(within=100e9, between=10e9)
GRADIENTS = 4 * PARAMETERS
GATHERED = 2 * (ROOT + 2 * 24 * BLOCK)


@pytest.mark.parametrize(
    ("sharding", "cluster", "seconds"),
    [
        ("none", ONE, 0),
        ("full", ONE, 0),
        ("none", Cluster(1, 8), 2 * 7 / 8 * GRADIENTS / 100e9),
        ("none", Cluster(4, 1), 2 * 3 / 4 * GRADIENTS / 10e9),
        ("none", Cluster(4, 8), 2 * (7 / 8 * GRADIENTS / 100e9 + 3 / 4 * GRADIENTS / 8 / 10e9)),
        ("full", Cluster(1, 8), 32 * 7 / 8 * (GATHERED + GRADIENTS) / 100e9),
        ("hybrid", Cluster(1, 8), 32 * 7 / 8 * (GATHERED + GRADIENTS) / 100e9),
        (
            "hybrid",
            Cluster(4, 8),
            8 * (7 / 8 * (GATHERED + GRADIENTS) / 100e9 + 2 * 3 / 4 * GRADIENTS / 8 / 10e9),
        ),
    ],
)
def test_seconds_of_communication_are_those_of_rings(sharding: str, cluster: Cluster, seconds: float) -> None:
    """1,024 sequences in micro-batches of 4: 32 on each of 8 devices, 8 on each of 32."""
    assert communication_seconds(LARGE, "NVIDIA H100", cluster, sharding, LINKS) == pytest.approx(seconds)


def test_float32_gathers_twice_the_bytes_of_bf16() -> None:
    half, single = (
        communication_seconds(LARGE.with_training(precision=name), "NVIDIA H100", Cluster(1, 8), "full", LINKS)
        for name in ("bf16", "float32")
    )
    assert single - half == pytest.approx(32 * 7 / 8 * GATHERED / 100e9)


def estimate(cluster: Cluster, sharding: str, links: Links) -> ClusterStep:
    return estimate_cluster_step(LARGE, H100, cluster, sharding, links, table_throughput(LARGE, H100))


def test_fast_links_leave_no_communication_exposed() -> None:
    step = estimate(Cluster(1, 8), "none", Links(1e15, 1e15))
    assert (step.exposed, step.communication_share) == (0, 0)


@pytest.mark.parametrize(("sharding", "overlapping"), [("none", 1 / 32), ("full", 1)])
def test_communication_overlaps_with_the_backward_pass_that_it_belongs_to(sharding: str, overlapping: float) -> None:
    step = estimate(Cluster(1, 8), sharding, Links(1e9, 1e9))
    assert step.exposed == pytest.approx(step.communication - 2 / 3 * step.compute * overlapping)
    assert step.communication_share == pytest.approx(step.exposed / step.total)


def test_two_devices_compute_in_half_the_time_but_two_processes_of_one_cpu_do_not() -> None:
    config, links = user_config(), Links(1e9, 1e9)
    for machine, factor in ((H100, 2), (Machine("cpu-avx2", 4), 1)):
        throughput = table_throughput(config, machine)
        one, two = (
            estimate_cluster_step(config, machine, Cluster(1, devices), "none", links, throughput) for devices in (1, 2)
        )
        assert one.compute == pytest.approx(factor * two.compute, rel=0.01)


@pytest.mark.parametrize(
    ("device", "links"),
    [
        ("NVIDIA H100 80GB HBM3", Links(NVLINK_4, INFINIBAND_NDR)),
        ("NVIDIA H200", Links(NVLINK_4, INFINIBAND_NDR)),
        ("NVIDIA A100-SXM4-40GB", Links(300e9, 25e9)),
        ("NVIDIA L4", Links(32e9, ETHERNET_100G / 8)),
    ],
)
def test_links_are_those_of_the_card(device: str, links: Links) -> None:
    assert links_of(device, Cluster(2, 8)) == links


@pytest.mark.parametrize("device", ["NVIDIA H100", "cpu-avx2"])
def test_a_cluster_of_one_device_has_the_memory_of_the_plain_plan(device: str) -> None:
    assert cluster_memory(user_config(), device, ONE, "none") == estimate_memory(user_config(), device)
