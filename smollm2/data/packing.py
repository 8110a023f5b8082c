"""Documents packed into windows, so that few documents are cut and few positions are padding.

A document longer than a window is cut into whole windows and a rest, which is packed like a short document. Packing is
best fit decreasing, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830): the longest piece first, each into
the window with the least room that still holds it. It runs over one buffer of documents after another: packing all
documents at once would save less than 0.1 % of the positions, and takes more memory and time.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.stream import MARK, Stream, Tokens
from smollm2.data.windows import Batch, Ints, TokenWindows, read_ids
from smollm2.storage.atomic import Target, write_atomically

BUFFER = 8192
"""Documents packed at a time. On log-normal lengths (mean 1,000, sigma 1.2), windows of 512, 2,048 and 8,192 tokens have
0.01, 0.02 and 0.06 % padding; with 1,024 documents 0.09, 0.16 and 0.42 % (2026-11, 1 million documents)."""

FORMAT = int.from_bytes(b"packs\x00\x00\x01", "little")
HEADER_BYTES = 6 * 8

Words = npt.NDArray[np.uint64]
SmallWords = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Packs:
    """Which pieces of documents each window holds, in the order of the stream: window i holds the pieces firsts[i] to
    firsts[i + 1] - 1, and piece p is the tokens from starts[p] to starts[p] + lengths[p] - 1."""

    length: int
    tokens: int
    documents_cut: int
    firsts: Words  # (windows + 1,)
    starts: Words  # (pieces,)
    lengths: SmallWords  # (pieces,)

    def __len__(self) -> int:
        return len(self.firsts) - 1

    @property
    def padding_share(self) -> float:
        """Return the share of the positions that hold no token."""
        return 1 - self.tokens / (len(self) * self.length)

    def describe(self) -> str:
        """Return how well the documents fit, in one line."""
        cut = "1 document was cut" if self.documents_cut == 1 else f"{self.documents_cut:,} documents were cut"
        windows = "1 window" if len(self) == 1 else f"{len(self):,} windows"
        return f"{windows} of {self.length:,} tokens, {self.padding_share:.2%} padding; {cut}"


class PackedWindows(TokenWindows):
    """Windows that hold the documents of `packs`, which was made for these tokens.

    A window reads the token before its first piece, if there is one, and then its pieces: every token but the first of
    the stream is a target exactly once. If documents are isolated, the first token of a document is not a target, and
    neither is that of the rest of a long document, unless the rest is the first piece of its window.
    """

    def __init__(self, tokens: Stream | Tokens, packs: Packs, vocab_size: int, end_of_text: int | None = None) -> None:
        super().__init__(tokens, packs.length, vocab_size, end_of_text)
        assert packs.tokens == len(tokens)
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    @property
    def tokens_used(self) -> int:
        """Return how many tokens the windows read: it is all of them."""
        return self.packs.tokens

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Return the pieces of window i; the first begins one token early, unless it is the start of the stream."""
        pieces = slice(int(self.packs.firsts[i]), int(self.packs.firsts[i + 1]))
        starts, lengths = self.packs.starts[pieces].tolist(), self.packs.lengths[pieces].tolist()
        spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        return [(max(0, starts[0] - 1), spans[0][1]), *spans[1:]]


class ConversationWindows(PackedWindows):
    """Windows that hold whole conversations, which do not see one another. Their stream marks the tokens that are not
    targets. The first token of a conversation is never a target, nor is that of the rest of one that was cut."""

    def __init__(self, tokens: Stream | Tokens, packs: Packs, vocab_size: int) -> None:
        super().__init__(tokens, packs, vocab_size)

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Return the pieces of window i."""
        pieces = slice(int(self.packs.firsts[i]), int(self.packs.firsts[i + 1]))
        starts, lengths = self.packs.starts[pieces].tolist(), self.packs.lengths[pieces].tolist()
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    def read(self, i: int) -> Batch:
        """Return window i. Raise DataError if an id is outside the vocabulary or the file has changed."""
        input_ids, labels = np.zeros(self.length, np.int64), np.full(self.length, IGNORE_INDEX, np.int64)
        spans = self.spans(i)
        documents, at = np.full(self.length, len(spans), np.int64), 0
        for number, span in enumerate(spans):
            marked = read_ids(self.tokens, *span, self.vocab_size, marks=True)
            ids, end = marked % MARK, at + len(marked)
            input_ids[at:end], documents[at:end] = ids, number
            labels[at : end - 1] = np.where(marked[1:] < MARK, ids[1:], IGNORE_INDEX)
            at = end
        return Batch(input_ids, labels, documents)


def pack_documents(ends: Words, length: int, *, buffer: int = BUFFER) -> Packs:
    """Return the documents packed into windows of at most `length` tokens, `buffer` documents at a time.

    `ends` (documents,) is the position after the last token of each document, ascending. Documents of up to `length`
    tokens are not cut. The same input gives the same result. One million documents take about a second.
    """
    assert len(ends) and length >= 1
    counts: list[Ints] = []
    starts, lengths = [], []
    documents_cut = end = 0
    for first in range(0, len(ends), buffer):
        stops = np.asarray(ends[first : first + buffer]).astype(np.int64)
        sizes = np.diff(stops, prepend=end)
        end, documents_cut = int(stops[-1]), documents_cut + int((sizes > length).sum())
        pieces = _pack_buffer(stops - sizes, sizes, length)
        counts.append(pieces[0])
        starts.append(pieces[1].astype("<u8"))
        lengths.append(pieces[2].astype("<u4"))
    firsts = np.cumsum(np.concatenate([[0], *counts])).astype("<u8")
    return Packs(length, end, documents_cut, firsts, np.concatenate(starts), np.concatenate(lengths))


def _pack_buffer(begins: Ints, sizes: Ints, length: int) -> tuple[Ints, Ints, Ints]:
    """Return the number of pieces in each window, and the starts and lengths of all pieces, window by window."""
    whole, rest = np.divmod(sizes, length)  # whole windows of each document
    number = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    filling = np.repeat(begins, whole) + number * length
    kept = np.flatnonzero(rest)
    starts, rest = (begins + whole * length)[kept], rest[kept]
    longest_first = np.argsort(-rest, kind="stable")
    window = np.empty(len(rest), np.int64)
    window[longest_first] = _choose_windows(rest[longest_first].tolist(), length)
    by_window = np.argsort(window, kind="stable")  # stable: the order of the stream within a window
    counts = np.concatenate([np.ones_like(filling), np.bincount(window)])
    lengths = np.concatenate([np.full_like(filling, length), rest[by_window]])
    return counts, np.concatenate([filling, starts[by_window]]), lengths


def _choose_windows(sizes: Sequence[int], length: int) -> list[int]:
    """Return the window for each size, given in descending order: the one with the least room that is enough."""
    chosen: list[int] = []
    count, limit = 0, len(sizes)
    rooms: list[int] = []  # room x limit + window, of each window with room, ascending
    for size in sizes:
        at = bisect_left(rooms, size * limit)
        if at < len(rooms):
            room, window = divmod(rooms.pop(at), limit)
        else:
            room, window, count = length, count, count + 1
        if room > size:
            insort(rooms, (room - size) * limit + window)
        chosen.append(window)
    return chosen


def save_packs(packs: Packs, path: Path) -> None:
    """Write the packs to a file atomically: six numbers (uint64, little-endian), then firsts, starts and lengths.

    Raise ResourceError on a system error.
    """
    numbers = (FORMAT, packs.length, packs.tokens, packs.documents_cut, len(packs), len(packs.starts))
    parts = (np.array(numbers, "<u8"), packs.firsts, packs.starts, packs.lengths)

    def write(target: Target) -> None:
        for part in parts:
            target.write(part.data)

    write_atomically(path, write, size=sum(part.nbytes for part in parts))


def open_packs(path: Path) -> Packs | None:
    """Return the packs in a file, memory-mapped, or None if it does not exist or is not as long as its header says."""
    try:
        header = np.fromfile(path, "<u8", HEADER_BYTES // 8).tolist()
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    if len(header) != HEADER_BYTES // 8 or header[0] != FORMAT:
        return None
    _, length, tokens, documents_cut, windows, pieces = header
    after_firsts = HEADER_BYTES + 8 * (windows + 1)
    after_starts = after_firsts + 8 * pieces
    if size != after_starts + 4 * pieces:
        return None
    return Packs(
        length,
        tokens,
        documents_cut,
        np.memmap(path, "<u8", "r", HEADER_BYTES, (windows + 1,)),
        np.memmap(path, "<u8", "r", after_firsts, (pieces,)),
        np.memmap(path, "<u4", "r", after_starts, (pieces,)),
    )
