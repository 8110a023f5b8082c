"""The rows that `smollm2 plan --devices N --machines M` adds."""

import pytest
from plans import user_config

from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.plan.describe_cluster import describe_batch, describe_cluster, describe_size, find_memory
from smollm2.plan.machine import Machine, memory_limit
from smollm2.plan.scale import Cluster

CPU = Machine("cpu-avx2", 2)
LARGE = load_config(preset="smollm2-1.7b")


def rows(config: Config, machine: Machine, cluster: Cluster, memory_bytes: int | None = 8 * 10**9) -> dict[str, str]:
    return {name.strip(): text for name, text in describe_cluster(config, machine, cluster, memory_bytes)}


def test_the_rows_hold_memory_sharding_and_time() -> None:
    found = rows(LARGE, CPU, Cluster(8, 8))
    assert found["cluster"] == "8 machines with 8 devices each, 64 together"
    assert found["global batch"] == "1,024 sequences: 16 for each device, in 4 micro-batches of at most 4"
    assert found["none"].startswith(
        "53.1 GB for each GPU: fits H200, H100, A100; 63.5 GB of 8 GB for each process here"
    )
    assert found["none"].endswith("does not fit")
    assert found["hybrid"].startswith("26.2 GB for each GPU: fits H200, H100, A100, L40S;")
    assert found["time on H100"].endswith("sharding none (auto: no sharding is needed)")
    assert found["time on L40S"].endswith("sharding hybrid (auto: without sharding it does not fit)")
    assert "waiting for communication" in found["time on L40S"]
    assert found["time on T4"].startswith("does not fit: 23.2 GB with sharding full, more than 90% of 16 GB; lower")
    assert "H100 450 / 50, A100 300 / 25" in found["links"]


def test_on_one_machine_hybrid_is_full() -> None:
    assert rows(LARGE, CPU, Cluster(1, 8))["hybrid"] == "on one machine the same as full"


def test_a_sharding_that_is_set_is_not_chosen() -> None:
    found = rows(LARGE.with_training(sharding="hybrid"), CPU, Cluster(2, 8))
    assert found["time on H100"].endswith("sharding hybrid (as set)")


def test_a_gpu_here_has_no_row_for_processes_and_a_time_of_its_own() -> None:
    found = rows(user_config(), Machine("NVIDIA H100", 8, 8), Cluster(1, 8), 80 * 10**9)
    assert "process" not in found["none"]
    assert found["time here"] == found["time on H100"]


def test_a_gpu_of_unknown_memory_is_said_to_be_unknown() -> None:
    found = rows(LARGE, Machine("NVIDIA Unheard-of", 8, 8), Cluster(1, 8), None)
    assert found["time here"].endswith("sharding none (assumed, because the memory of this GPU is unknown)")


@pytest.mark.parametrize(
    ("cluster", "text"),
    [
        (Cluster(1, 4), "48 sequences: 12 for each device, in one micro-batch"),
        (
            Cluster(1, 7),
            "48 sequences, which 7 devices cannot share equally; the nearest possible size is 49 or 42. The rows below "
            "are for 49: 7 for each device, in one micro-batch",
        ),
        (
            Cluster(8, 8),
            "48 sequences, which 64 devices cannot share equally; the nearest possible size is 64. The rows below are "
            "for 64: 1 for each device, in one micro-batch",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_is_named_with_the_nearest_ones(cluster: Cluster, text: str) -> None:
    assert describe_batch(user_config(), cluster) == text


@pytest.mark.parametrize(
    ("cluster", "text"),
    [
        (Cluster(1, 1), "1 machine with 1 device"),
        (Cluster(1, 8), "1 machine with 8 devices"),
        (Cluster(4, 1), "4 machines with 1 device each, 4 together"),
    ],
)
def test_a_cluster_has_a_name_that_can_be_read(cluster: Cluster, text: str) -> None:
    assert describe_size(cluster) == text


@pytest.mark.parametrize(
    ("device", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 80),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA H200", 141),
        ("NVIDIA GeForce RTX 4090", 24),
        ("Tesla T4", 16),
        ("NVIDIA L40", None),
    ],
)
def test_the_memory_of_a_gpu_is_that_of_its_name(device: str, gigabytes: int | None) -> None:
    found = find_memory(Machine(device, 8, 8), Cluster(1, 8))
    assert found == (gigabytes and gigabytes * 10**9)


def test_processes_on_a_cpu_share_its_memory() -> None:
    assert find_memory(CPU, Cluster(2, 4)) == memory_limit() // 4
