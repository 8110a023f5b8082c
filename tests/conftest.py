"""Fixtures that several test files use: the shared data, which is not committed."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take long on a busy machine before they count as hung."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1500))
