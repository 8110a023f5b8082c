"""A sequence of token ids that lies in several files: sliced like an array, read in place.

A file is mapped when it is first read, so opening a stream of any size costs nothing. If a file changes while it is
mapped, the next read of it is refused. (A read beyond the end of a truncated file would end the process with SIGBUS.)
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smollm2.errors import DataError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Dtype = np.dtype[np.unsignedinteger[Any]]


MARK = 2**31
"""Added to the id of a token that is not a target, where a store marks them: in conversations."""


def choose_dtype(vocab_size: int, *, marks: bool = False) -> Dtype:
    """Return the little-endian type in which ids are stored: two bytes if all of them fit, else four."""
    return np.dtype("<u2") if vocab_size <= 2**16 and not marks else np.dtype("<u4")


@dataclass(frozen=True)
class Piece:
    """A file of a stream: its number of ids, and the byte at which they begin. `check` may refuse it when it is opened."""

    folder: Path
    name: str  # a Path for each of thousands of shards would take most of the time of opening a store
    tokens: int
    offset: int = 0
    check: Callable[[Path], object] = lambda path: None

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.folder / self.name


class Stream:
    """Ids `start` to `stop` - 1 of several files, one after another. `len()` and slices with step 1 work as for arrays."""

    def __init__(self, pieces: Sequence[Piece], dtype: Dtype, start: int = 0, stop: int | None = None) -> None:
        self.pieces, self.dtype = pieces, dtype
        self._ends = list(accumulate(piece.tokens for piece in pieces))
        total = self._ends[-1] if pieces else 0
        self.start, self.stop = start, total if stop is None else stop
        self._mapped: dict[int, tuple[Tokens, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, positions: slice) -> Tokens:
        """Return the ids at the positions: a view of the file if they lie in one, else a copy."""
        first, last, _ = positions.indices(len(self))
        parts = [self._read(number, begin, end) for number, begin, end in self._cut(first, max(first, last))]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def part(self, start: int, stop: int) -> "Stream":
        """Return positions `start` to `stop` - 1 as a stream."""
        return Stream(self.pieces, self.dtype, self.start + start, self.start + stop)

    def tolist(self) -> list[int]:
        """Return all ids; for tests and short texts."""
        return [int(i) for i in self[:]]

    def locate(self, position: int) -> tuple[Path, int]:
        """Return the file that holds a position, and the number of the token in that file."""
        number, begin, _ = next(self._cut(position, position + 1))
        return self.pieces[number].path, begin

    def _cut(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (file, first, last + 1) for each file that holds some of these positions."""
        at, end = self.start + first, self.start + last
        number = bisect_right(self._ends, at)
        while at < end:
            begins = self._ends[number] - self.pieces[number].tokens
            until = min(end, self._ends[number])
            if until > at:
                yield number, at - begins, until - begins
            at, number = until, number + 1

    def _read(self, number: int, begin: int, end: int) -> Tokens:
        piece = self.pieces[number]
        if number not in self._mapped:
            piece.check(piece.path)
            ids: Tokens = np.memmap(piece.path, self.dtype, "r", offset=piece.offset, shape=(piece.tokens,))
            self._mapped[number] = ids, identify(piece.path)
        mapped, identity = self._mapped[number]
        now = identify(piece.path)
        # A file that was removed or replaced stays mapped as it was: another inode does not count as a change.
        if now != identity and now[:1] == identity[:1]:
            what, advice = "the file changed while it was being read", "restore it, or delete its folder"
            raise DataError(piece.path, what, f"{advice} and resume: tokens in the cache are made again")
        return mapped[begin:end]


def identify(path: Path) -> tuple[int, ...]:
    """Return the inode, size and modification time of a file; nothing if it is absent."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
