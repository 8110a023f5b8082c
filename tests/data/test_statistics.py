"""Statistics of documents, compared with plain Python."""

import json
import statistics
import tracemalloc
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.data.statistics import summarize_documents


def summarize(lengths: list[int], hashes: list[int] | None = None, size: int | None = None) -> dict[str, Any]:
    """Documents of these lengths in tokens, of four characters each, distinct if no hashes are given."""
    tokens = np.array(lengths, np.uint64)
    found = hashes if hashes is not None else range(len(lengths))
    return cast(dict[str, Any], summarize_documents(4 * tokens, tokens, np.array(found, np.uint64), size))


def test_the_summary_is_ready_for_json() -> None:
    summary = summarize([1, 2, 3, 900], [7, 8, 7, 2**64 - 1], size=4_000)
    assert json.loads(json.dumps(summary)) == summary


def test_totals_are_sums_over_the_documents() -> None:
    summary = summarize([3, 5, 12], size=81)
    assert {name: summary[name] for name in ("documents", "characters", "bytes", "tokens", "characters_per_token")} == {
        "documents": 3,
        "characters": 80,
        "bytes": 81,
        "tokens": 20,
        "characters_per_token": 4.0,
    }


def test_bytes_are_absent_if_they_are_unknown() -> None:
    assert "bytes" not in summarize([1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=300))
def test_lengths_are_those_of_a_sorted_list(lengths: list[int]) -> None:
    found = summarize(lengths)["lengths"]
    ordered = sorted(lengths)
    assert found["mean"] == pytest.approx(statistics.fmean(lengths))
    assert found["median"] == statistics.median_low(lengths)
    assert found["percentile_95"] == ordered[-(-95 * len(ordered) // 100) - 1]
    assert found["longest"] == ordered[-1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=300))
def test_each_document_is_in_the_bin_of_its_length(lengths: list[int]) -> None:
    bins = summarize(lengths)["histogram"]
    assert [one["documents"] for one in bins] == [
        sum(one["at_least"] <= length < one["below"] for length in lengths) for one in bins
    ]
    assert sum(one["documents"] for one in bins) == len(lengths)
    assert [one["below"] for one in bins[:-1]] == [one["at_least"] for one in bins[1:]]


@pytest.mark.parametrize(
    ("length", "at_least", "below"),
    [
        *[(0, 0, 1), (1, 1, 2), (2, 2, 4), (3, 2, 4), (4, 4, 8), (1_023, 512, 1_024), (1_024, 1_024, 2_048)],
        *[(2**53 + 1, 2**53, 2**54), (2**54 - 1, 2**53, 2**54)],  # float64 cannot tell these from 2**53 and 2**54
    ],
)
def test_the_borders_of_the_histogram_are_powers_of_two(length: int, at_least: int, below: int) -> None:
    assert summarize([length])["histogram"] == [{"at_least": at_least, "below": below, "documents": 1}]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=100))
def test_a_document_whose_hash_occurred_before_is_a_duplicate(hashes: list[int]) -> None:
    lengths = [hash + 1 for hash in hashes]  # equal documents have equal lengths
    repeated = [i for i, hash in enumerate(hashes) if hash in hashes[:i]]
    found = summarize(lengths, hashes)["duplicates"]
    assert found["documents"] == len(repeated)
    assert found["token_share"] == pytest.approx(sum(lengths[i] for i in repeated) / sum(lengths))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=100))
def test_the_ten_longest_are_listed_and_of_equal_ones_the_first(lengths: list[int]) -> None:
    found = summarize(lengths)["longest"]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[:10]
    assert [one["index"] for one in found] == order
    assert [(one["tokens"], one["characters"]) for one in found] == [(lengths[i], 4 * lengths[i]) for i in order]


def test_no_document_has_a_summary_of_nothing() -> None:
    summary = summarize([])
    assert (summary["documents"], summary["histogram"], summary["longest"]) == (0, [], [])
    assert summary["lengths"] is None and summary["characters_per_token"] is None
    assert summary["duplicates"] == {"documents": 0, "token_share": 0.0}


def test_the_memory_is_a_few_times_that_of_the_inputs() -> None:
    count = 1_000_000
    noise = np.random.default_rng(0)
    tokens, hashes = (noise.integers(0, high, count).astype(np.uint64) for high in (5_000, 2**40))
    tracemalloc.start()
    summarize_documents(tokens, tokens, hashes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * tokens.nbytes
