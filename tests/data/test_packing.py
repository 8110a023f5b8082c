"""Documents packed into windows: nothing is lost, nothing is read twice, and little is padding."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.packing import BUFFER, PackedWindows, Packs, Words, open_packs, pack_documents, save_packs
from smollm2.data.stream import Tokens
from smollm2.errors import DataError

EXAMPLE = [3, 9, 2, 4, 1, 2]
"""Lengths of documents; in windows of 4 tokens, the second one is cut into 4, 4 and 1."""


def ends_of(sizes: list[int]) -> Words:
    return np.cumsum(sizes).astype(np.uint64)


def tokens_of(sizes: list[int]) -> Tokens:
    """A token's id is its position + 1, or 0 for an end of text."""
    ids = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    ids[np.cumsum(sizes) - 1] = 0
    return ids


def packed_windows(sizes: list[int], length: int, *, isolates: bool = False) -> PackedWindows:
    packs = pack_documents(ends_of(sizes), length)
    return PackedWindows(tokens_of(sizes), packs, sum(sizes) + 1, 0 if isolates else None)


def web_like_lengths(documents: int) -> list[int]:
    """Log-normal, with a mean of 1,000 tokens."""
    sigma = 1.2
    drawn = np.random.default_rng(0).lognormal(np.log(1000) - sigma**2 / 2, sigma, documents)
    lengths: list[int] = np.maximum(2, drawn.astype(np.int64)).tolist()
    return lengths


def arrays_of(packs: Packs) -> list[list[int]]:
    return [packs.firsts.tolist(), packs.starts.tolist(), packs.lengths.tolist()]


document_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(lambda sizes: sum(sizes) > 1)
properties = settings(max_examples=300, deadline=None)


@properties
@given(document_sizes, st.integers(1, 40), st.integers(1, 12))
def test_every_token_but_the_first_of_the_stream_is_a_target_exactly_once(
    sizes: list[int], length: int, buffer: int
) -> None:
    count = sum(sizes)
    tokens = np.arange(count, dtype=np.uint16)
    windows = PackedWindows(tokens, pack_documents(ends_of(sizes), length, buffer=buffer), count)
    labels = np.concatenate([windows.read(i).labels for i in range(len(windows))])
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == list(range(1, count))
    assert windows.tokens_used == count


@properties
@given(document_sizes, st.integers(1, 40))
def test_if_documents_are_isolated_every_target_follows_its_predecessor_and_is_one_once(
    sizes: list[int], length: int
) -> None:
    """The first token of a document is not a target. That of the rest of a cut one is, if it begins its window."""
    tokens, windows = tokens_of(sizes), packed_windows(sizes, length, isolates=True)
    targets: list[int] = []
    for i in range(len(windows)):
        input_ids, labels, _ = windows.read(i)
        used = labels != IGNORE_INDEX
        following = input_ids[used]  # an id is its position + 1: the position of the target
        assert np.array_equal(labels[used], tokens[following])
        targets += following.tolist()
    inside_windows = np.delete(windows.packs.starts, windows.packs.firsts[:-1].astype(np.int64))
    excluded = {0, *ends_of(sizes).tolist(), *inside_windows.tolist()}
    assert sorted(targets) == [at for at in range(len(tokens)) if at not in excluded]


@properties
@given(document_sizes, st.integers(1, 40))
def test_document_ids_change_where_the_documents_of_a_window_do(sizes: list[int], length: int) -> None:
    windows = packed_windows(sizes, length, isolates=True)
    for i in range(len(windows)):
        input_ids, _, document_ids = windows.read(i)
        assert document_ids is not None
        inside = input_ids != 0  # an id is its position + 1
        documents = np.searchsorted(ends_of(sizes), input_ids[inside] - 1, side="right")
        assert np.array_equal(np.diff(document_ids[inside]) > 0, np.diff(documents) != 0)


@properties
@given(document_sizes, st.integers(1, 40), st.integers(1, 12))
def test_no_window_is_over_its_length(sizes: list[int], length: int, buffer: int) -> None:
    packs = pack_documents(ends_of(sizes), length, buffer=buffer)
    assert np.add.reduceat(packs.lengths, packs.firsts[:-1].astype(np.int64)).max() <= length


@properties
@given(document_sizes, st.integers(1, 40), st.integers(1, 12))
def test_only_documents_longer_than_a_window_are_cut_into_whole_windows_and_a_rest(
    sizes: list[int], length: int, buffer: int
) -> None:
    packs = pack_documents(ends_of(sizes), length, buffer=buffer)
    expected = [
        (begin + at, min(length, size - at))
        for begin, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False)
        for at in range(0, size, length)
    ]
    assert sorted(zip(packs.starts.tolist(), packs.lengths.tolist(), strict=True)) == expected
    assert packs.documents_cut == sum(size > length for size in sizes)


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_at_most_one_percent_of_web_like_documents_is_padding(length: int) -> None:
    sizes = web_like_lengths(2 * BUFFER)
    packs = pack_documents(ends_of(sizes), length)
    assert packs.tokens == sum(sizes) == int(packs.lengths.sum(dtype=np.int64))
    assert 0 <= packs.padding_share <= 0.01


def test_a_piece_goes_where_the_least_room_is_left() -> None:
    packs = pack_documents(ends_of([6, 7, 3, 2]), 10)  # 7, then 6; 3 fills the window of 7, and 2 goes to that of 6
    assert arrays_of(packs) == [[0, 2, 4], [6, 13, 0, 16], [7, 3, 6, 2]]


def test_the_packs_of_format_1_stay_what_they_are() -> None:
    packs = pack_documents(ends_of(EXAMPLE), 4)
    assert arrays_of(packs) == [[0, 1, 2, 3, 5, 7, 8], [3, 7, 14, 0, 11, 12, 19, 18], [4, 4, 4, 3, 1, 2, 2, 1]]


def test_a_window_begins_with_the_token_before_its_first_piece() -> None:
    windows = packed_windows(EXAMPLE, 4, isolates=True)
    read = [windows.read(i) for i in (1, 4)]  # within a long document, and after the end of one
    assert [window.input_ids.tolist() for window in read] == [[7, 8, 9, 10], [0, 13, 0, 20]]
    assert [window.labels.tolist() for window in read] == [[8, 9, 10, 11], [IGNORE_INDEX, 0, IGNORE_INDEX, 0]]
    assert [window.document_ids.tolist() for window in read if window.document_ids is not None] == [
        [0, 0, 0, 0],
        [0, 1, 1, 2],
    ]


def test_documents_are_not_numbered_if_they_are_not_isolated() -> None:
    assert packed_windows(EXAMPLE, 4).read(0).document_ids is None


def test_a_line_describes_the_packs() -> None:
    found = pack_documents(ends_of(EXAMPLE), 4).describe()
    assert found == "6 windows of 4 tokens, 12.50% padding; 1 document was cut"


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read() -> None:
    tokens = tokens_of(EXAMPLE)
    tokens[12] = 500
    windows = PackedWindows(tokens, pack_documents(ends_of(EXAMPLE), 4), 21 + 1)
    windows.read(0)
    with pytest.raises(DataError, match="token 12 has id 500, but the vocabulary size is 22"):
        windows.read(4)


def test_a_stream_of_one_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"too few tokens \(1\)"):
        packed_windows([1], 4)


def test_saved_packs_are_read_back_equal(tmp_path: Path) -> None:
    packs = pack_documents(ends_of(web_like_lengths(500)), 512)
    save_packs(packs, tmp_path / "packs")
    found = open_packs(tmp_path / "packs")
    assert found is not None and isinstance(found.starts, np.memmap)
    assert arrays_of(found) == arrays_of(packs)
    assert found.describe() == packs.describe() and found.tokens == packs.tokens


def test_the_same_documents_give_the_same_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_packs(pack_documents(ends_of(web_like_lengths(2000)), 512), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packs"
    save_packs(pack_documents(ends_of(EXAMPLE), 4), path)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert open_packs(path) is None, size
    path.write_bytes(content + b"\0")
    assert open_packs(path) is None


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packs"
    save_packs(pack_documents(ends_of(EXAMPLE), 4), path)
    content = path.read_bytes()
    path.write_bytes(content[:7] + b"\2" + content[8:])
    assert open_packs(path) is None


def test_there_are_no_packs_if_there_is_no_file(tmp_path: Path) -> None:
    assert open_packs(tmp_path / "packs") is None
