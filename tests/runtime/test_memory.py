"""Memory of this machine."""

import os
import platform

import pytest
import torch
import torch._inductor.config

from smollm2.runtime.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_memory_freed_by_a_step_is_reused_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource  # Windows has none

    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    keep_freed_memory()
    page_faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(6 * 2**20) for _ in range(5)]  # 120 MB
        del pieces
        page_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(page_faults) < 10_000  # of 30,000
