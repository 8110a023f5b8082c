"""Every token but the first is a target exactly once, for any length and stride."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.windows import Windows
from smollm2.errors import DataError


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    length = draw(st.integers(1, 40))
    return draw(st.integers(2, 300)), length, draw(st.integers(1, length))


@settings(max_examples=300, deadline=None)
@given(shapes())
def test_every_token_but_the_first_is_a_target_exactly_once(shape: tuple[int, int, int]) -> None:
    count, length, stride = shape
    tokens = np.arange(count, dtype=np.uint16)
    windows = Windows(tokens, length, stride, count)
    targets: list[int] = []
    for i in range(len(windows)):
        input_ids, labels, _ = windows.read(i)
        assert input_ids.shape == labels.shape == (length,)
        used = labels != IGNORE_INDEX
        assert used.any()
        assert np.array_equal(labels[used], input_ids[used] + 1)  # the stream counts: the next token is one more
        targets += labels[used].tolist()
    assert targets == list(range(1, count))
    assert windows.tokens_used == count


@settings(max_examples=300, deadline=None)
@given(shapes(), st.data())
def test_if_documents_are_isolated_only_the_first_token_of_each_is_not_a_target(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    count, length, stride = shape
    tokens = np.arange(1, count + 1, dtype=np.uint16)
    tokens[sorted(data.draw(st.sets(st.integers(0, count - 1))))] = 0  # ends of text
    windows = Windows(tokens, length, stride, count + 1, end_of_text=0)
    targets: list[int] = []
    for i in range(len(windows)):
        first = i * stride
        input_ids, labels, document_ids = windows.read(i)
        assert document_ids is not None and document_ids.shape == (length,)
        used = np.flatnonzero(labels != IGNORE_INDEX)
        assert np.array_equal(labels[used], tokens[first + used + 1])
        assert np.array_equal(input_ids[used], tokens[first + used])
        targets += (first + used + 1).tolist()
        ends = tokens[first : first + length] == 0
        crossings = np.flatnonzero(np.diff(document_ids[: len(ends)]))
        assert np.array_equal(crossings, np.flatnonzero(ends[:-1]))
    assert targets == [at for at in range(1, count) if tokens[at - 1] != 0]


def test_an_end_of_text_belongs_to_the_document_that_it_ends() -> None:
    tokens = np.array([3, 4, 0, 5, 0, 6, 7], np.uint16)
    input_ids, labels, document_ids = Windows(tokens, 6, 6, 8, end_of_text=0).read(0)
    assert input_ids.tolist() == [3, 4, 0, 5, 0, 6]
    assert labels.tolist() == [4, 0, IGNORE_INDEX, 0, IGNORE_INDEX, 7]
    assert document_ids is not None and document_ids.tolist() == [0, 0, 0, 1, 1, 2]


def test_documents_are_not_numbered_if_they_are_not_isolated() -> None:
    assert Windows(np.arange(7, dtype=np.uint16), 4, 4, 7).read(0).document_ids is None


def test_the_tokens_before_a_windows_targets_are_its_context() -> None:
    input_ids, labels, _ = Windows(np.arange(10, dtype=np.uint16), 4, 2, 10).read(1)
    assert input_ids.tolist() == [2, 3, 4, 5]
    assert labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 5, 6]


def test_the_last_window_is_padded_and_not_dropped() -> None:
    windows = Windows(np.arange(7, dtype=np.uint16), 4, 4, 7)
    assert len(windows) == 2
    input_ids, labels, _ = windows.read(1)
    assert input_ids.tolist() == [4, 5, 0, 0]
    assert labels.tolist() == [5, 6, IGNORE_INDEX, IGNORE_INDEX]


def test_a_text_shorter_than_a_window_is_one_padded_window() -> None:
    windows = Windows(np.array([3, 1], np.uint16), 8, 8, 4)
    assert len(windows) == 1
    assert windows.read(0).labels.tolist() == [1] + [IGNORE_INDEX] * 7


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_tokens_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=rf"too few tokens \({count}\)"):
        Windows(np.zeros(count, np.uint16), 4, 4, 10)


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    tokens[9] = 500
    windows = Windows(tokens, 4, 4, 12)
    windows.read(0)
    with pytest.raises(DataError, match="token 9 has id 500, but the vocabulary size is 12"):
        windows.read(2)
