"""Memory of this machine."""

import contextlib
import ctypes
import os
import platform
import re
from pathlib import Path

from smollm2.plan.arithmetic import MAPPED

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next update; by default each update gives 100 MB back, and has every page of it
    made anew: 10 % of its time (benchmarks/README.md). Who set MALLOC_* in the environment is left alone."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def memory_limit() -> int | None:
    """Bytes of memory that this machine or this container has; None where the system does not say.

    What it has, not what is free: the same run must be cut the same way when it goes on tomorrow.
    """
    sources = (("/proc/meminfo", r"MemTotal:\s+(\d+) kB", 1024), ("/sys/fs/cgroup/memory.max", r"(\d+)\n", 1))
    found = []
    for path, pattern, unit in sources:
        with contextlib.suppress(OSError):
            if match := re.match(pattern, Path(path).read_text()):
                found.append(int(match[1]) * unit)
    return min(found, default=None)


def memory_free() -> int | None:
    """Bytes of memory that can be had now, on this machine or in this container; None where the system does not say."""
    with contextlib.suppress(OSError):
        if match := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            free = int(match[1]) * 1024
            with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
                limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
                free = min(free, limit - used)
            return free
    return None
