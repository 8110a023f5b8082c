"""Detect the machine without torch: the cores that this process may use, the kind of CPU or GPU, and the memory.

A container limits cores and memory through cgroups, which exist in two versions; a batch system limits cores through
CPU affinity. `root` is the root of the file system to read; tests pass their own folder.
"""

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
WSL_TOOLS = "usr/lib/wsl/lib"
"""The folder of nvidia-smi in WSL, which has no /proc/driver/nvidia."""

ONEDNN_ISAS_WITH_BF16 = ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")
"""Substrings of ONEDNN_MAX_CPU_ISA values that allow bf16 matrix products in hardware."""


@dataclass(frozen=True)
class Machine:
    """The hardware that a run uses."""

    device: str  # a row of the table in throughput.py (`cpu-avx2`, `mps`), or a GPU's name
    cores: int  # number that the run may use on this machine
    gpus: int = 0  # number visible under CUDA_VISIBLE_DEVICES
    devices: int = 1  # GPUs, or machines without a GPU, that share the work of a step

    @property
    def is_cpu(self) -> bool:
        """Whether the run computes on the CPU."""
        return self.device.startswith("cpu")


def find_machine(environment: Mapping[str, str], root: Path = ROOT) -> Machine:
    """Return the hardware that training would use here: a GPU if one is visible, else the CPU."""
    gpus = list_gpus(environment, root)
    if gpus:
        return Machine(gpus[0], count_cores(root), len(gpus))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return Machine("mps", count_cores(root))
    return Machine(cpu_class(environment, root), count_cores(root))


def leaves_bf16(environment: Mapping[str, str]) -> bool:
    """Return whether ONEDNN_MAX_CPU_ISA lets torch use the CPU's bf16 units, if there are any."""
    isa = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "ALL"
    return any(part in isa.upper() for part in ONEDNN_ISAS_WITH_BF16)


def cpu_class(environment: Mapping[str, str], root: Path = ROOT) -> str:
    """Return the CPU's row in the table of throughput.py.

    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA limit the instructions that torch uses, so they limit the class as well.
    """
    hint = environment.get("ATEN_CPU_CAPABILITY", "")
    features = set(re.findall(r"\w+", _read(root / "proc/cpuinfo")))
    if hint == "default" or not {"avx2", "fma"} <= features:
        return "cpu-float32"
    if hint == "avx2" or "avx512f" not in features:
        return "cpu-avx2"
    if not leaves_bf16(environment):
        return "cpu-avx512"
    if "amx_bf16" in features:
        return "cpu-amx"
    return "cpu-bf16" if "avx512_bf16" in features else "cpu-avx512"


def list_gpus(environment: Mapping[str, str], root: Path = ROOT) -> list[str]:
    """Return the names of the NVIDIA GPUs that are visible to this process under CUDA_VISIBLE_DEVICES."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    found = _gpus_of_driver(root) or _gpus_of_tool(environment, root)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [name for name, _ in found]
    names = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdecimal() and int(word) < len(found):
            names.append(found[int(word)][0])
        elif matching := [name for name, identity in found if word and identity.startswith(word)]:
            names.append(matching[0])
        elif word.startswith("MIG-") and found:  # a slice of a GPU; its name does not say of which GPU
            names.append(found[0][0])
        else:  # CUDA ignores everything after the first device that does not exist
            break
    return names


def _gpus_of_driver(root: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        facts = dict(re.findall(r"^([^:]+):\s*(.*?)\s*$", _read(path), re.MULTILINE))
        found.append((facts.get("Model", "NVIDIA GPU"), facts.get("GPU UUID", "")))
    return found


def _gpus_of_tool(environment: Mapping[str, str], root: Path) -> list[tuple[str, str]]:
    """Return (name, UUID) of each GPU that nvidia-smi lists, for WSL and for containers without /proc/driver."""
    tool = shutil.which("nvidia-smi", path=f"{environment.get('PATH', '')}{os.pathsep}{root / WSL_TOOLS}")
    if tool is None:
        return []
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+: (.*) \(UUID: (.*)\)\s*$", listed.stdout, re.MULTILINE)


def count_cores(root: Path = ROOT, allowed: set[int] | None = None) -> int:
    """Return the number of physical cores that affinity, cpuset and cgroup quota allow this process.

    `allowed` is the set of logical processor numbers, by default this process's affinity.
    """
    allowed = allowed or _allowed_processors()
    physical = psutil.cpu_count(logical=False) or len(allowed)
    if cores := _cores_of_processors(root):
        physical = len({cores.get(number, (number,)) for number in allowed})
    quota = min(_cgroup_quotas(root), default=math.inf)
    return max(1, int(min(physical, len(allowed), quota)))


def _allowed_processors() -> set[int]:
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # absent on macOS
        return set(process.cpu_affinity())
    return set(range(os.cpu_count() or 1))


def _cores_of_processors(root: Path) -> dict[int, tuple[object, ...]]:
    """Return the physical core of each logical processor. Two hyperthreads are two logical processors of one core."""
    cores: dict[int, tuple[object, ...]] = {}
    for block in _read(root / "proc/cpuinfo").split("\n\n"):
        facts = dict(re.findall(r"^([^:\t]+?)\s*:\s*(.*)$", block, re.MULTILINE))
        if facts.keys() >= {"processor", "physical id", "core id"}:
            cores[int(facts["processor"])] = (facts["physical id"], facts["core id"])
    return cores


def _cgroup_quotas(root: Path) -> Iterator[float]:
    for folder in _cgroup_folders(root, "cpu"):
        if match := re.match(r"(\d+) (\d+)", _read(folder / "cpu.max")):
            yield int(match[1]) / int(match[2])
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period:
            yield quota / period


def memory_limit(root: Path = ROOT) -> int:
    """Return the total memory of this machine or container, in bytes.

    The free memory is not used, because a resumed run must choose the same micro-batch size.
    """
    names = ("memory.max", "memory.limit_in_bytes")
    limits = [_number(folder / name) for folder in _cgroup_folders(root, "memory") for name in names]
    return min([psutil.virtual_memory().total, *filter(None, limits)])


def available_memory(root: Path = ROOT) -> int:
    """Return the memory that this process can still allocate, in bytes, on this machine or in this container."""
    free = [psutil.virtual_memory().available]
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _cgroup_folders(root, "memory"):
        for limit, used in (tuple(_number(folder / name) for name in pair) for pair in names):
            if limit and used is not None:
                free.append(max(0, limit - used))
    return min(free)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders with this process's limits: its own cgroup and all parents, in both cgroup versions."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/", f"1:{controller}:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in (base / controller, base / controllers) if controllers else (base, base / "unified"):
            group = mount / path.lstrip("/")
            yield group
            yield from (parent for parent in group.parents if parent.is_relative_to(mount))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """Return the whole number in a file; None if it contains anything else, such as `max` or `-1` for no limit."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None
