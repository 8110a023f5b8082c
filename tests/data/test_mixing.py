"""Which source each window comes from: exact shares, any position in O(1), the same for any slicing."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.data.batches import Batches
from smollm2.data.mixing import MixtureSchedule, Turns
from smollm2.data.windows import Windows

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)


def draw(schedule: MixtureSchedule | Turns, count: int) -> np.ndarray:
    return schedule.draw(np.arange(count))[0]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_after_any_number_of_windows_each_share_is_within_one_window_of_its_weight(units: list[int]) -> None:
    turns = Turns(units)
    sources = draw(turns, 2 * turns.period + 3)
    drawn = np.cumsum(sources[:, None] == np.arange(len(units)), axis=0)
    wanted = np.arange(1, len(sources) + 1)[:, None] * np.array(units) / sum(units)
    assert np.abs(drawn - wanted).max() < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(WEIGHTS, min_size=1, max_size=3), st.integers(0, 10_000))
def test_ordinals_and_counts_follow_from_the_sources_across_stages(stages: list[list[int]], seed: int) -> None:
    size = max(map(len, stages))
    stages = [[*weights, *[0] * (size - len(weights))] for weights in stages]
    starts = [
        0,
        *np.sort(np.random.default_rng(seed).choice(np.arange(1, 300), len(stages) - 1, replace=False)).tolist(),
    ]
    schedule = MixtureSchedule(stages, starts)
    sources, ordinals = schedule.draw(np.arange(400))
    for source in range(size):
        assert ordinals[sources == source].tolist() == list(range((sources == source).sum()))
    for position in (0, *starts, 399):
        assert schedule.count(position).tolist() == np.bincount(sources[:position], minlength=size).tolist()


def test_a_source_with_weight_zero_is_never_drawn() -> None:
    assert set(draw(Turns([3, 0, 1]), 400)) == {0, 2}


def test_a_far_position_is_found_without_the_ones_before_it() -> None:
    schedule = MixtureSchedule([[9999, 1], [1, 9999]], [0, 10**12])
    far = [10**12 - 1, 10**12 + 10_000]
    sources, ordinals = schedule.draw(np.array(far))
    assert ordinals.tolist() == [
        schedule.count(position)[source] for position, source in zip(far, sources, strict=True)
    ]
    assert schedule.count(10**12).tolist() == [999_900_000_000, 100_000_000]


def make_batches(sizes: Sequence[int], units: Sequence[Sequence[int]], starts: Sequence[int], size: int = 8) -> Batches:
    windows = [
        Windows(np.arange(10_000 * number, 10_000 * number + 4 * count + 1, dtype=np.uint16), 4, 4, 65_536)
        for number, count in enumerate(sizes)
    ]
    return Batches(windows, 7, size, MixtureSchedule(units, starts))


def test_each_source_is_read_in_whole_epochs_across_stages() -> None:
    batches = make_batches([10, 25], [[1, 1], [1, 3]], [0, 64])
    ids = np.concatenate([batches.window_ids(n) for n in range(40)])
    for source, size in ((0, 10), (1, 25)):
        first = batches.windows.first[source]
        own = ids[(ids >= first) & (ids < first + size)]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(first, first + size))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_ranks_only_slice_a_batch(world_size: int) -> None:
    batches = make_batches([10, 25], [[1, 3]], [0])
    share = 8 // world_size
    rows = [batches.read(5, rank * share, (rank + 1) * share).input_ids for rank in range(world_size)]
    assert np.array_equal(np.concatenate(rows), batches.read(5, 0, 8).input_ids)


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    one, other = (make_batches([10, 25], [[1, 3], [2, 2]], [0, 80]) for _ in range(2))
    assert [one.window_ids(n).tolist() for n in range(30)] == [
        other.window_ids(n).tolist() for n in reversed(range(30))
    ][::-1]


def test_a_source_alone_has_the_order_of_a_run_without_a_mixture() -> None:
    alone = make_batches([10], [[1]], [0])
    mixed = make_batches([10, 25], [[1, 0]], [0])
    assert all(np.array_equal(alone.window_ids(n), mixed.window_ids(n)) for n in range(9))


def test_epochs_are_counted_by_source() -> None:
    assert make_batches([10, 40], [[1, 1]], [0]).epochs_of(10) == [4.0, 1.0]
