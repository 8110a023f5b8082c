"""How glibc's allocator handles freed memory."""

import ctypes
import os
import platform

from smollm2.plan.arithmetic import MAPPED

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, unless a MALLOC_* environment variable is set.

    By default, each step returns 100 MB to the operating system and faults every page in again, which takes 10 % of its
    time (benchmarks/README.md).
    """
    set_thresholds(MAPPED, 2**31 - 1)


def return_freed_memory_at_once() -> None:
    """Let glibc return freed memory, because the buffers of a shared-out model leave gaps: two ranks of a 59M model took
    1.76 GB each without this, and 0.99 GB with it (two AVX2 cores, torch 2.13, 2026-11-26)."""
    set_thresholds(2**20, 2**20)


def set_thresholds(mapped: int, trimmed: int) -> None:
    """Set from which size glibc maps an allocation, and from how many free bytes it returns them."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, mapped)
        libc.mallopt(M_TRIM_THRESHOLD, trimmed)


def return_freed_memory() -> None:
    """Return the memory of freed tensors to the operating system; glibc keeps it for later ones of at most the same size."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
