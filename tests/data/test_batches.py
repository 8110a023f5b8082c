"""The order of the data is a function of (seed, n) and reads every window once an epoch."""

import threading
import time
from collections.abc import Iterable

import numpy as np
import pytest

from smollm2.data.batches import Batches, permute, prefetched
from smollm2.data.mixing import MixtureSchedule
from smollm2.data.windows import Windows


def make_batches(windows: int = 23, seed: int = 7, global_batch_size: int = 4) -> Batches:
    tokens = np.arange(windows * 5 + 1, dtype=np.uint16)
    return Batches([Windows(tokens, 5, 5, 1000)], seed, global_batch_size)


AROUND_POWERS = {
    2**power + change for power in range(8, 11) for change in (-1, 0, 1)
}  # where the number of bits changes


@pytest.mark.parametrize(
    "sizes",
    [{*range(1, 257), *AROUND_POWERS}, pytest.param(range(1, 2001), marks=pytest.mark.slow)],
    ids=["to 256", "to 2000"],
)
def test_the_permutation_is_a_bijection_for_every_size(sizes: Iterable[int]) -> None:
    for size in sizes:
        index = np.tile(np.arange(size), 3)
        keys = np.repeat(np.array([0, 1, 2**64 - 1], np.uint64), size)
        for places in permute(index, size, keys).reshape(3, size):
            assert np.array_equal(np.sort(places), np.arange(size)), size


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 - 1, 2**62])
def test_the_permutation_of_a_huge_corpus_is_computed_for_single_indices(size: int) -> None:
    index = np.array([0, 1, 2, size // 2, size - 2, size - 1])
    places = permute(index, size, np.uint64(3))
    assert len(set(places.tolist())) == 6 and places.min() >= 0 and places.max() < size


def test_every_window_comes_first_about_equally_often() -> None:
    firsts = permute(np.zeros(20_000, np.int64), 10, np.arange(20_000, dtype=np.uint64))
    counts = np.bincount(firsts, minlength=10)
    assert abs(counts - 2000).max() < 250  # 6 standard deviations


def test_neighbours_do_not_remain_neighbours() -> None:
    places = permute(np.arange(10_000), 10_000, np.uint64(5))
    assert (np.diff(places) == 1).mean() < 0.002


def test_each_epoch_reads_every_window_once_and_in_its_own_order() -> None:
    batches = make_batches(windows=23, global_batch_size=4)
    ids = np.concatenate([batches.window_ids(n) for n in range(23)])
    epochs = ids.reshape(4, 23)
    assert all(np.array_equal(np.sort(epoch), np.arange(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_batch_may_span_several_epochs_of_a_tiny_corpus() -> None:
    ids = make_batches(windows=3, global_batch_size=12).window_ids(5)
    assert np.bincount(ids).tolist() == [4, 4, 4]


@pytest.mark.filterwarnings("error")
def test_many_sources_are_drawn_without_a_warning() -> None:
    windows = [Windows(np.arange(100, dtype="<u2"), 5, 5, 1000) for _ in range(5)]
    batches = Batches(windows, 2**63 - 1, 5, MixtureSchedule([[1] * 5], [0]))
    assert len(batches.window_ids(3)) == 5


def test_another_seed_is_another_order() -> None:
    orders = {tuple(make_batches(seed=seed).window_ids(0).tolist()) for seed in (0, 1, 2, 2**63 - 1)}
    assert len(orders) == 4


def test_the_order_of_version_1_stays_what_it_is() -> None:
    assert make_batches().window_ids(6).tolist() == [10, 0, 17, 21]


def test_slices_of_a_batch_are_the_batch() -> None:
    batches = make_batches()
    whole_ids, whole_labels, _ = batches.read(9, 0, 4)
    parts = [batches.read(9, start, start + 2) for start in (0, 2)]
    assert np.array_equal(whole_ids, np.concatenate([part.input_ids for part in parts]))
    assert np.array_equal(whole_labels, np.concatenate([part.labels for part in parts]))
    assert whole_ids.shape == (4, 5) and whole_ids.dtype == np.int64
    assert np.array_equal(whole_ids[:, 0], batches.window_ids(9) * 5)


def test_a_batch_numbers_the_documents_of_each_of_its_windows() -> None:
    tokens = np.array([1, 0, 2, 3, 4, 0, 5, 6, 0], np.uint16)
    batches = Batches([Windows(tokens, 4, 4, 7, end_of_text=0)], 0, 2)
    document_ids = batches.read(0, 0, 2).document_ids
    assert document_ids is not None
    assert document_ids[np.argsort(batches.window_ids(0))].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_epoch_counts_how_often_the_corpus_was_read() -> None:
    batches = make_batches(windows=8, global_batch_size=4)
    assert [batches.epoch_of(n) for n in (0, 1, 2, 5)] == [0.0, 0.5, 1.0, 2.5]


def test_prefetched_batches_are_the_same_batches() -> None:
    batches = make_batches()
    coming = prefetched(batches, 3, 1, 3)
    for n in range(3, 12):
        for got, wanted in zip(next(coming)[:2], batches.read(n, 1, 3)[:2], strict=True):
            assert np.array_equal(got, wanted)
    coming.close()


def test_closing_ends_the_thread() -> None:
    coming = prefetched(make_batches(), 0, 0, 4)
    next(coming)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    coming.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_caller() -> None:
    batches = Batches([Windows(np.array([1, 9, 1], np.uint16), 1, 1, 5)], 0, 2)
    with pytest.raises(Exception, match="the vocabulary size is 5"):
        next(prefetched(batches, 0, 0, 2))


def test_a_batch_far_into_a_run_costs_what_the_first_one_costs() -> None:
    batches = make_batches(windows=1000)
    begin = time.perf_counter()
    for n in range(10**12, 10**12 + 100):
        batches.window_ids(n)
    assert time.perf_counter() - begin < 2
