"""The overlap of training and validation, compared with sets of tuples."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.data.overlap import HIGH_SHARE, LENGTH, STRETCH, Overlap, hash_ngrams, measure_overlap

Ids = npt.NDArray[np.uint16]


def ngrams(ids: Ids) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + LENGTH].tolist()) for i in range(len(ids) - LENGTH + 1)]


def brute_force(train: Ids, validation: Ids) -> float:
    known, asked = set(ngrams(train)), ngrams(validation)
    return sum(one in known for one in asked) / len(asked)


class Recorder:
    """A stream of the numbers from 0 on that records what is read of it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.slices: list[slice] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint64]:
        self.slices.append(part)
        return np.arange(part.start, part.stop, dtype=np.uint64)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(13, 400), st.integers(13, 400), st.integers(0, 2**32 - 1))
def test_the_share_is_that_of_a_comparison_of_all_13_grams(kinds: int, first: int, second: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    train, validation = (noise.integers(0, kinds, length).astype(np.uint16) for length in (first, second))
    validation[: len(train) // 2] = train[: len(validation)][: len(train) // 2]  # a part that was copied
    assert measure_overlap(train, validation).share == brute_force(train, validation)


REPETITIVE = np.tile(np.arange(20, dtype=np.uint16), 30)
RANDOM = np.random.default_rng(0).integers(0, 60_000, 5_000).astype(np.uint16)

CASES: dict[str, tuple[Ids, Ids, float]] = {
    "identical": (RANDOM, RANDOM, 1.0),
    "identical and repetitive": (REPETITIVE, REPETITIVE, 1.0),
    "disjoint": (RANDOM, np.arange(60_000, 65_000, dtype=np.uint16), 0.0),
    "the same ids in another order": (REPETITIVE, REPETITIVE[::-1], 0.0),
    "12 tokens in common": (np.append(RANDOM[:12], RANDOM[100:113]), RANDOM[:13], 0.0),
    "13 tokens in common": (RANDOM[:13], np.append(RANDOM[:13], RANDOM[100:113]), 1 / 14),
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_of_known_streams(case: str) -> None:
    train, validation, share = CASES[case]
    assert measure_overlap(train, validation).share == pytest.approx(share)


@pytest.mark.parametrize("change", range(LENGTH))
def test_each_of_the_13_ids_counts(change: int) -> None:
    ids = np.arange(LENGTH, dtype=np.uint16)
    other = ids.copy()
    other[change] = 500
    assert measure_overlap(ids, other).share == 0.0


def test_ids_of_any_type_have_the_same_hash() -> None:
    assert np.array_equal(hash_ngrams(RANDOM), hash_ngrams(RANDOM.astype(np.uint32)))


def test_the_hashes_of_many_similar_13_grams_are_distinct() -> None:
    ids = np.array(np.meshgrid(*[[0, 1]] * LENGTH)).reshape(LENGTH, -1).T.astype(np.uint16)
    assert len({int(hash_ngrams(one)[0]) for one in ids}) == 2**LENGTH


@pytest.mark.parametrize(
    ("train", "validation", "sentence"),
    [
        (100, 12, "the overlap was not measured: validation has 12 tokens, and a 13-gram needs 13"),
        (12, 100, "the overlap was not measured: training has 12 tokens, and a 13-gram needs 13"),
        (0, 0, "the overlap was not measured: validation has 0 tokens, and a 13-gram needs 13"),
    ],
)
def test_fewer_than_13_tokens_have_no_share(train: int, validation: int, sentence: str) -> None:
    overlap = measure_overlap(RANDOM[:train], RANDOM[:validation])
    assert overlap.share is None and not overlap.is_high
    assert overlap.describe() == sentence


def test_at_most_the_limit_is_read_evenly_spaced() -> None:
    train, validation = Recorder(10**12), Recorder(50_000)
    overlap = measure_overlap(train, validation, limit=50_000)
    starts = [part.start for part in train.slices]
    assert {part.stop - part.start for part in train.slices} == {STRETCH} and len(starts) == 5
    assert starts[0] == 0 and train.slices[-1].stop == 10**12 and len(set(np.diff(starts))) == 1
    assert (overlap.train_tokens_read, overlap.validation_tokens_read) == (50_000, 50_000)
    assert validation.slices == [slice(0, 50_000)]


def test_a_limit_below_a_stretch_is_kept() -> None:
    assert measure_overlap(Recorder(1_000), Recorder(1_000), limit=100).train_tokens_read == 100


def test_no_13_gram_crosses_from_one_stretch_to_the_next() -> None:
    assert measure_overlap(Recorder(10**9), Recorder(10**6), limit=20_000).compared == 2 * (STRETCH - LENGTH + 1)


@pytest.mark.parametrize(
    ("train_read", "validation_read", "sentence"),
    [
        (1_000, 200, "12.5% of the validation 13-grams also occur in training"),
        (
            500,
            200,
            "at least 12.5% of the validation 13-grams also occur in training (measured on 500 of 1,000 training tokens)",
        ),
        (
            1_000,
            100,
            "about 12.5% of the validation 13-grams also occur in training (measured on 100 of 200 validation tokens)",
        ),
        (
            500,
            100,
            "at least 12.5% of the validation 13-grams also occur in training "
            "(measured on 500 of 1,000 training tokens and 100 of 200 validation tokens)",
        ),
    ],
)
def test_the_sentence_names_what_was_not_read(train_read: int, validation_read: int, sentence: str) -> None:
    assert Overlap(0.125, 88, 1_000, train_read, 200, validation_read).describe() == sentence


@pytest.mark.parametrize(("share", "is_high"), [(HIGH_SHARE, False), (HIGH_SHARE + 0.01, True), (0.0, False)])
def test_the_overlap_is_high_above_a_tenth(share: float, is_high: bool) -> None:
    assert Overlap(share, 1, 1, 1, 1, 1).is_high == is_high


def test_the_memory_is_bounded_by_the_limit() -> None:
    tracemalloc.start()
    measure_overlap(Recorder(10**9), Recorder(10**9), limit=500_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000 * 50  # bytes per token


def test_the_run_folder_gets_the_share_the_sentence_and_whether_it_is_high() -> None:
    assert measure_overlap(RANDOM, RANDOM).as_dict() == {
        "share": 1.0,
        "text": "100.0% of the validation 13-grams also occur in training",
        "is_high": True,
    }
