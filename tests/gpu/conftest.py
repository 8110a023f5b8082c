"""The device of these tests: a CUDA GPU, or the CPU in a rehearsal, which shows that the tests themselves work.

    GPU_SUITE_REHEARSAL=1 python -m pytest tests/gpu

`scripts/gpu_suite.sh` sets the variable on a machine without a GPU. What a CPU cannot do is skipped there as well.
"""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device under test, with products in float32 as the run that a test starts wants them."""
    if torch.cuda.is_available():
        before = torch.get_float32_matmul_precision()
        yield torch.device("cuda")
        torch.set_float32_matmul_precision(before)
        torch.cuda.empty_cache()
    elif os.environ.get("GPU_SUITE_REHEARSAL"):
        yield torch.device("cpu")
    else:
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A CUDA GPU, for what a rehearsal on a CPU cannot show."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU: a rehearsal on a CPU cannot show this")
    return device
