"""A stream of tokens, read as windows: window i reads length + 1 tokens, starting at token i x stride.

Every token but the first of the stream is a target exactly once: if windows overlap, the shared tokens are context
(label -100), and the last window is padded, never dropped. If documents are isolated, the first token of each is not a
target either, because no token that may be attended to comes before it.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.stream import MARK, Stream, Tokens
from smollm2.errors import DataError

Ints = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """One window, each (T,), or several, each (B, T): labels[t] is the token after input_ids[t], or -100 if it is not a
    target; document_ids number the documents of a window in order, or are None if documents are not isolated."""

    input_ids: Ints
    labels: Ints
    document_ids: Ints | None = None


def stack(windows: Sequence[Batch]) -> Batch:
    """Return several windows as one batch."""
    input_ids, labels, _ = (tuple(column) for column in zip(*windows, strict=True))
    document_ids = [window.document_ids for window in windows if window.document_ids is not None]
    return Batch(np.stack(input_ids), np.stack(labels), np.stack(document_ids) if document_ids else None)


class WindowSource(Protocol):
    """The windows of one source, in the order of its text."""

    length: int

    def __len__(self) -> int: ...

    @property
    def tokens_used(self) -> int:
        """Return how many tokens the windows read."""
        ...

    def read(self, i: int) -> Batch:
        """Return window i. Raise DataError if an id is outside the vocabulary or the file has changed."""
        ...


class JoinedWindows:
    """The windows of several sources, numbered one source after another; source s begins with window `first[s]`."""

    def __init__(self, sources: Sequence[WindowSource], names: Sequence[str] = ("",)) -> None:
        self.sources, self.names, self.length = sources, names, sources[0].length
        self.first = [0, *accumulate(map(len, sources))]

    def __len__(self) -> int:
        return self.first[-1]

    @property
    def tokens_used(self) -> int:
        """Return how many tokens the windows read."""
        return sum(source.tokens_used for source in self.sources)

    def read(self, i: int) -> Batch:
        """Return window i. Raise DataError if an id is outside the vocabulary or the file has changed."""
        source = bisect_right(self.first, i) - 1
        return self.sources[source].read(i - self.first[source])


def number_documents(input_ids: Ints, end_of_text: int) -> Ints:
    """Return how many documents end before each position (..., T): an end of text belongs to the document it ends."""
    ends = input_ids == end_of_text
    before: Ints = np.cumsum(ends, -1, dtype=np.int64) - ends
    return before


class TokenWindows(ABC):
    """`len()` windows of `length` positions over a stream of tokens; a subclass chooses which tokens each one reads.

    With `end_of_text`, the id that ends each document, documents are isolated. Raise DataError if there are fewer than
    two tokens.
    """

    def __init__(self, tokens: Stream | Tokens, length: int, vocab_size: int, end_of_text: int | None) -> None:
        if len(tokens) < 2:
            what = f"the text has too few tokens ({len(tokens)}): at least two are needed"
            raise DataError("the token stream", what, "use more text")
        self.tokens, self.length, self.vocab_size, self.end_of_text = tokens, length, vocab_size, end_of_text

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def tokens_used(self) -> int:
        """Return how many tokens the windows read: it is all of them, as the statistics line shows."""

    @abstractmethod
    def spans(self, i: int) -> list[tuple[int, int]]:
        """Return the (start, stop) of the parts of the stream that window i reads in turn, in all at most length + 1
        tokens."""

    def context(self, i: int) -> int:
        """Return how many of the first labels of window i are not targets, because another window has them."""
        return 0

    def read(self, i: int) -> Batch:
        """Return window i. Raise DataError if an id is outside the vocabulary or the file has changed."""
        ids = np.concatenate([read_ids(self.tokens, *span, self.vocab_size) for span in self.spans(i)])
        input_ids, labels = np.zeros(self.length, np.int64), np.full(self.length, IGNORE_INDEX, np.int64)
        input_ids[: len(ids) - 1] = ids[:-1]
        context = self.context(i)
        labels[context : len(ids) - 1] = ids[context + 1 :]
        if self.end_of_text is None:
            return Batch(input_ids, labels)
        labels[input_ids == self.end_of_text] = IGNORE_INDEX
        return Batch(input_ids, labels, number_documents(input_ids, self.end_of_text))


def read_ids(tokens: Stream | Tokens, first: int, last: int, vocab_size: int, *, marks: bool = False) -> Ints:
    """Return the ids at positions `first` to `last` - 1, which may have `marks`.

    Raise DataError if one is outside the vocabulary.
    """
    found = tokens[first:last].astype(np.int64)
    ids = found % MARK if marks else found
    if ids.max() >= vocab_size:
        at = first + int(ids.argmax())
        where, at = tokens.locate(at) if isinstance(tokens, Stream) else ("the token stream", at)
        what = f"token {at} has id {ids.max()}, but the vocabulary size is {vocab_size}"
        raise DataError(where, what, "use the tokenizer that made the tokens, or make them again")
    return found


class Windows(TokenWindows):
    """Contiguous windows, a new one every `stride` tokens (1 to `length`)."""

    def __init__(
        self, tokens: Stream | Tokens, length: int, stride: int, vocab_size: int, end_of_text: int | None = None
    ) -> None:
        super().__init__(tokens, length, vocab_size, end_of_text)
        assert 1 <= stride <= length
        self.stride = stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.length) // self.stride))

    @property
    def tokens_used(self) -> int:
        """Return how many tokens the windows read: it is all of them, as the statistics line shows."""
        return min(len(self.tokens), (len(self) - 1) * self.stride + self.length + 1)

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Return the one part of the stream that window i reads."""
        first = i * self.stride
        return [(first, min(first + self.length + 1, len(self.tokens)))]

    def context(self, i: int) -> int:
        """Return how many labels of window i are targets of the window before it."""
        return self.length - self.stride if i > 0 else 0
