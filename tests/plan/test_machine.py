"""Cores, CPU class, GPUs and memory, read from the files of a system that the tests write."""

import os
import platform
import shlex
from pathlib import Path

import psutil
import pytest

from smollm2.plan.machine import (
    available_memory,
    count_cores,
    cpu_class,
    find_machine,
    list_gpus,
    memory_limit,
)

AVX2 = "fpu sse2 fma avx2"
AVX512 = f"{AVX2} avx512f avx512bw"
BF16 = f"{AVX512} avx512_bf16"
AMX = f"{BF16} amx_tile amx_bf16"
GROUP = "batch/job_7"


def write(root: Path, **files: str) -> Path:
    """Write files whose names have __ for /, and return the root."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def write_cgroup(root: Path, version: int, **settings: str) -> Path:
    """Write settings of the group batch/job_7, __ in a name is a dot: memory__max."""
    for name, text in settings.items():
        controller = name.split("__")[0]
        base = root / "sys/fs/cgroup" / ("" if version == 2 else controller)
        folder = base / GROUP
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    lines = [f"0::/{GROUP}"] if version == 2 else [f"4:memory:/{GROUP}", f"3:cpu,cpuacct:/{GROUP}", "0::/"]
    return write(root, proc__self__cgroup="\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ("fpu sse2", {}, "cpu-float32"),
        (AVX2, {}, "cpu-avx2"),
        (AVX512, {}, "cpu-avx512"),
        (BF16, {}, "cpu-bf16"),
        (AMX, {}, "cpu-amx"),
        (AMX, {"ATEN_CPU_CAPABILITY": "avx2"}, "cpu-avx2"),
        (BF16, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "cpu-avx2"),
        (BF16, {"ATEN_CPU_CAPABILITY": "avx512"}, "cpu-bf16"),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "cpu-avx512"),
        (BF16, {"ATEN_CPU_CAPABILITY": "default"}, "cpu-float32"),
        ("fpu sse2", {"ATEN_CPU_CAPABILITY": "avx2"}, "cpu-float32"),
    ],
)
def test_a_cpu_has_a_class_and_the_hint_of_torch_lowers_it(
    tmp_path: Path, flags: str, environment: dict[str, str], expected: str
) -> None:
    write(tmp_path, proc__cpuinfo=f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu_class(environment, tmp_path) == expected


def test_a_machine_without_cpuinfo_has_an_unknown_cpu(tmp_path: Path) -> None:
    assert cpu_class({}, tmp_path) == "cpu-float32"


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")


@needs_affinity
def test_only_the_cores_that_the_affinity_allows_are_counted() -> None:
    """Of 16 cores, `taskset -c 0,1` leaves two."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def processors(pairs: list[tuple[int, int]]) -> str:
    """Return a /proc/cpuinfo of processors with (physical id, core id)."""
    blocks = [
        f"processor\t: {number}\nphysical id\t: {chip}\ncore id\t\t: {core}\n"
        for number, (chip, core) in enumerate(pairs)
    ]
    return "\n".join(blocks)


def test_two_hyperthreads_are_one_core(tmp_path: Path) -> None:
    write(tmp_path, proc__cpuinfo=processors([(0, 0), (0, 1), (0, 0), (0, 1)]))
    assert count_cores(tmp_path, {0, 1, 2, 3}) == 2
    write(tmp_path, proc__cpuinfo=processors([(0, 0), (0, 1), (1, 0), (1, 1)]))
    assert count_cores(tmp_path, {0, 1, 2, 3}) == 4


@pytest.mark.parametrize(
    ("version", "settings", "cores"),
    [
        (2, {"cpu__max": "200000 100000"}, 2),
        (2, {"cpu__max": "50000 100000"}, 1),
        (2, {"cpu__max": "max 100000"}, 8),
        (1, {"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"}, 3),
        (1, {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 8),
    ],
)
def test_a_cgroup_quota_limits_the_cores(tmp_path: Path, version: int, settings: dict[str, str], cores: int) -> None:
    write(tmp_path, proc__cpuinfo=processors([(0, core) for core in range(8)]))
    assert count_cores(write_cgroup(tmp_path, version, **settings), set(range(8))) == cores


@pytest.mark.parametrize(
    ("version", "settings", "limit"),
    [
        (2, {"memory__max": "300000000"}, 300_000_000),
        (2, {"memory__max": "max"}, None),
        (1, {"memory__limit_in_bytes": "300000000"}, 300_000_000),
        (1, {"memory__limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_a_cgroup_limits_the_memory(tmp_path: Path, version: int, settings: dict[str, str], limit: int | None) -> None:
    found = memory_limit(write_cgroup(tmp_path, version, **settings))
    assert found == (limit or psutil.virtual_memory().total)


def test_the_limit_of_a_group_above_counts_too(tmp_path: Path) -> None:
    write_cgroup(tmp_path, 2, memory__max="max")
    (tmp_path / "sys/fs/cgroup/batch/memory.max").write_text("200000000\n")
    assert memory_limit(tmp_path) == 200_000_000


def test_a_container_that_sees_its_own_group_as_the_root_has_its_limit(tmp_path: Path) -> None:
    """With a name space of its own a container's group is /; without one its path is that of the host."""
    write(tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__memory.max": "200000000\n"})
    assert memory_limit(tmp_path) == 200_000_000
    other = tmp_path / "v1"
    write(other, proc__self__cgroup="4:memory:/docker/0f1e\n")
    write(other, **{"sys__fs__cgroup__memory__memory.limit_in_bytes": "200000000\n"})
    assert memory_limit(other) == 200_000_000


@pytest.mark.parametrize(
    ("version", "settings"),
    [
        (2, {"memory__max": "300000000", "memory__current": "100000000"}),
        (1, {"memory__limit_in_bytes": "300000000", "memory__usage_in_bytes": "100000000"}),
    ],
)
def test_memory_that_the_container_has_used_is_not_available(
    tmp_path: Path, version: int, settings: dict[str, str]
) -> None:
    assert available_memory(write_cgroup(tmp_path, version, **settings)) == 200_000_000


def test_this_machine_can_be_read() -> None:
    assert 0 < available_memory() <= memory_limit() <= psutil.virtual_memory().total
    assert 1 <= find_machine(os.environ).cores <= (os.cpu_count() or 1)


GPUS = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA L4"]


def write_gpus(root: Path) -> Path:
    for number, name in enumerate(GPUS):
        text = f"Model: \t\t {name}\nIRQ:   \t\t 16\nGPU UUID: \t GPU-{number}badcafe-0000\n"
        write(root, **{f"proc__driver__nvidia__gpus__0000:0{number}:00.0__information": text})
    return root


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, GPUS),
        ("", []),
        ("-1", []),
        ("1", GPUS[1:2]),
        ("2,0", [GPUS[2], GPUS[0]]),
        ("0,7,1", GPUS[:1]),
        ("0,-1,1", GPUS[:1]),
        ("GPU-1bad", GPUS[1:2]),
        ("MIG-0a0b", GPUS[:1]),
        ("none", []),
    ],
)
def test_cuda_visible_devices_chooses_the_gpus(tmp_path: Path, visible: str | None, expected: list[str]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert list_gpus(environment, write_gpus(tmp_path)) == expected


def test_the_first_visible_gpu_is_the_device_and_the_cpu_if_none_is(tmp_path: Path) -> None:
    write_gpus(tmp_path)
    found = find_machine({"CUDA_VISIBLE_DEVICES": "1,2"}, tmp_path)
    assert (found.device, found.gpus, found.is_cpu) == (GPUS[1], 2, False)
    if platform.system() != "Darwin":
        hidden = find_machine({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
        assert (hidden.device, hidden.gpus, hidden.is_cpu) == ("cpu-float32", 0, True)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("folder", ["usr/lib/wsl/lib", "bin"])
def test_the_gpu_of_windows_linux_is_found_by_its_tool(tmp_path: Path, folder: str) -> None:
    tool = tmp_path / folder / "nvidia-smi"
    tool.parent.mkdir(parents=True)
    listed = "GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-0badcafe-0000)"
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && echo {shlex.quote(listed)}\n')
    tool.chmod(0o755)
    environment = {"PATH": str(tmp_path / "bin")}
    assert list_gpus(environment, tmp_path) == ["NVIDIA GeForce RTX 3060"]
    assert list_gpus({**environment, "CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' ; exit 9\n")
    assert list_gpus(environment, tmp_path) == []
