"""Batch n as a pure function of (seed, n), in O(1) memory and time: resuming needs a number and nothing else.

The windows of a source are read in epochs, each in its own order: a keyed bijection of 0..size-1, computed for each index
and never stored. Six rounds of a Feistel network permute the next even power of two; an index that falls outside is
permuted again until it falls inside (cycle walking), at most 4 times on average. World size only affects slicing.
"""

import copy
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from smollm2.data.mixing import ONE_SOURCE, MixtureSchedule
from smollm2.data.windows import Batch, JoinedWindows, WindowSource, stack

ORDER_VERSION = 1
"""Incremented when (seed, n) gives other windows: a checkpoint of another version is not resumed bit-exactly."""

ROUNDS = 6

SOURCE_STEP = np.uint64(0xD1B54A32D192ED03)
"""Added to the seed for each further source, so that their orders have nothing to do with one another."""

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Batches:
    """All batches of a run: batch n begins at position n x global_batch_size of the windows of the run.

    The mixture says which source a position draws from. Each source is read in epochs, laid end to end. A window's number
    counts through all sources.
    """

    def __init__(
        self,
        sources: Sequence[WindowSource],
        seed: int,
        global_batch_size: int,
        mixture: MixtureSchedule = ONE_SOURCE,
    ) -> None:
        self.windows, self.seed, self.global_batch_size, self.mixture = (
            JoinedWindows(sources),
            seed,
            global_batch_size,
            mixture,
        )
        self.skips: tuple[int, ...] = ()

    def skipping(self, skips: Sequence[int]) -> "Batches":
        """Return these batches with some left out: `skips` are pairs (n, count), one after the other, in which batch n
        and all after it are each replaced by the one that comes `count` batches later."""
        batches = copy.copy(self)
        batches.skips = tuple(skips)
        return batches

    def place(self, n: int) -> int:
        """Return the place of batch n in the order without skips."""
        return n + sum(count for first, count in zip(self.skips[::2], self.skips[1::2], strict=True) if n >= first)

    def window_ids(self, n: int) -> Ints:
        """Return the windows of batch n, in order, shape (global_batch_size,)."""
        positions = self.place(n) * self.global_batch_size + np.arange(self.global_batch_size)
        sources, ordinals = self.mixture.draw(positions)
        ids = np.zeros_like(positions)
        for source in np.unique(sources):
            here, size = sources == source, len(self.windows.sources[source])
            epoch, index = np.divmod(ordinals[here], size)
            offset = np.uint64(int(source) * int(SOURCE_STEP) % 2**64)  # numpy warns where a product wraps around
            seed = np.full(epoch.shape, self.seed, np.uint64) + offset
            ids[here] = self.windows.first[source] + permute(index, size, _mix(_mix(seed) + epoch.astype(np.uint64)))
        return ids

    def read(self, n: int, start: int, stop: int) -> Batch:
        """Return rows start to stop - 1 of batch n."""
        return stack([self.windows.read(int(i)) for i in self.window_ids(n)[start:stop]])

    def epochs_of(self, n: int) -> list[float]:
        """Return how many times each source has been read when batch n begins."""
        drawn = self.mixture.count(self.place(n) * self.global_batch_size)
        return [int(count) / len(source) for count, source in zip(drawn, self.windows.sources, strict=True)]

    def epoch_of(self, n: int) -> float:
        """Return how many times the source that was read most often has been read when batch n begins."""
        return max(self.epochs_of(n))


def prefetched(batches: Batches, n: int, start: int, stop: int) -> Generator[Batch]:
    """Yield rows start to stop - 1 of batches n, n + 1, ...; the next is prepared while the caller uses this one.

    Close the iterator, or drop the last reference to it, to end its thread.
    """
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(batches.read, n, start, stop)
        while True:
            batch, n = coming.result(), n + 1
            coming = thread.submit(batches.read, n, start, stop)
            yield batch


def permute(index: Ints, size: int, key: Words | np.uint64) -> Ints:
    """Return the position of each `index`, within 0..size-1, in the order of `key` (one for all, or one per index)."""
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    places = _permute_once(index.astype(np.uint64), half, mask, keys)
    while (outside := places >= size).any():
        places[outside] = _permute_once(places[outside], half, mask, keys[outside])
    return places.astype(np.int64)


def _permute_once(x: Words, half: np.uint64, mask: np.uint64, key: Words) -> Words:
    left, right = x >> half, x & mask
    for round_number in range(ROUNDS):
        noise = _mix(_mix(key + np.uint64(round_number)) ^ right)
        left, right = right, left ^ (noise & mask)
    return (left << half) | right


def _mix(x: Words) -> Words:
    """Return splitmix64's finalizer (Steele, Lea, Flood 2014): every bit of x affects every bit of the result."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
