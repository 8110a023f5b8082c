"""Fixtures that several test files use: the shared data, which is not committed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    """The path of a shared file or folder; skips the test where it is absent."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout (../shared/data)")
    return path


@pytest.fixture
def shakespeare() -> Path:
    return shared("tinyshakespeare.txt")


@pytest.fixture
def smollm2_tokenizer_folder() -> Path:
    return shared("smollm2-tokenizer")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads: these wait for one another, on a busy machine for long. And a fork takes
    no other threads along: an operation that waits for them would wait for ever."""
    import torch  # not at the top: half of the files need none

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NUMERICS = ("model", "inference", "runtime", "training/test_step.py", "training/test_optim.py", "training/test_muon.py")
"""Folders and files whose tests compute differently with bf16 units and without: .ci/run runs them as both kinds."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of numerics. Slow tests may take long on a busy machine before they count as hung."""
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        if path.startswith(NUMERICS):
            item.add_marker("numerics")
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1500))
