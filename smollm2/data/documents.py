"""The documents of a text in chunks; what the first pass records of each; which ones are held out for validation.

A document is held out because of its own text: if the hash of the text is below a share of all hashes. So it stays on the
same side when the corpus grows, and copies of a document are on the same side, unless documents are so few or so long that
the share has to be adjusted.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smollm2.data.conversations import contents_of
from smollm2.data.sampling import spread_evenly

FEWEST_TO_SPLIT = 20
"""With fewer documents, the end of the text is held out instead of whole documents."""

FEWEST_TOKENS = 3
"""With fewer, the only target is an end of text, which stands for no byte: bits per byte would be undefined."""

Column = npt.NDArray[np.uint64]


def do_nothing() -> None:
    """The default of `stop`."""


class Chunk(NamedTuple):
    """Part of a document; `last` is true if the document ends with it."""

    text: str
    last: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents that were read once in full: at least one, and all of them text."""

    name: str
    separator: str | None  # the text between two documents of one text file
    size: int  # bytes
    characters: int
    blank_documents: int  # dropped: empty, or only white space
    blank_characters: int  # the white space in them
    sha256: str
    notes: tuple[str, ...]  # what to report to the user
    is_chat: bool = False  # whether each document is a conversation, as conversations.to_json writes it
    documents: "Documents"

    def chunks(self, stop: Callable[[], None] = do_nothing) -> Iterator[Chunk]:
        """Yield every document, except the blank ones, in chunks. `stop` is called often and may raise.

        Raise DataError if the text is no longer the one that was read.
        """
        raise NotImplementedError

    def sample(self, limit: int = 50_000_000, stop: Callable[[], None] = do_nothing) -> Iterator[str]:
        """Yield about `limit` bytes of the text in chunks spread evenly over it: what a tokenizer is trained on.

        The same documents give the same sample, whatever files they are read from.
        """
        texts = ((contents_of(one.text) if self.is_chat else one.text).encode() for one in self.chunks(stop))
        return (text.decode() for text in spread_evenly(texts, self.documents.bytes, limit))


class Documents:
    """The number of characters and the hash of each document that is not blank: 16 bytes per document."""

    def __init__(self) -> None:
        self._characters, self._hashes = array("Q"), array("Q")
        self._digest, self._length = hashlib.blake2b(digest_size=8), 0
        self.bytes = 0  # of all documents, in UTF-8

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, chunk: Chunk, data: bytes) -> None:
        """Count a chunk, whose text is `data` in UTF-8."""
        self._digest.update(data)
        self.bytes += len(data)
        self._length += len(chunk.text)
        if chunk.last:
            self._hashes.append(int.from_bytes(self._digest.digest(), "little"))
            self._characters.append(self._length)
            self._digest, self._length = hashlib.blake2b(digest_size=8), 0

    @property
    def characters(self) -> Column:
        """The number of characters of each document, (documents,)."""
        return np.frombuffer(self._characters, np.uint64)

    @property
    def hashes(self) -> Column:
        """The first 64 bits of BLAKE2b of each document's text, (documents,)."""
        return np.frombuffer(self._hashes, np.uint64)

    def is_split(self, fraction: float) -> bool:
        """Whether whole documents are held out, rather than nothing or the end of the text."""
        return fraction > 0 and len(self) >= FEWEST_TO_SPLIT

    def hold_out(self, fraction: float) -> bytearray:
        """Return 1 for each document that is held out for validation, else 0.

        These are the documents whose hash is below `fraction` of all hashes. If their text is less than half of that
        fraction, the documents with the next hashes follow; a document that would bring it over 1.5 times the fraction is
        left out. At least one document is held out, and never all: the shortest of 20 is at most a twentieth of the text.
        """
        chosen, taken = bytearray(len(self)), 0
        if not self.is_split(fraction):
            return chosen
        hashes, lengths = self.hashes, self.characters + np.uint64(1)  # an end of text follows each document
        target = max(fraction * int(lengths.sum()), FEWEST_TOKENS)
        for i in np.argsort(hashes, kind="stable").tolist():
            if int(hashes[i]) >= fraction * 2**64 and taken >= max(target / 2, FEWEST_TOKENS):
                break
            length = int(lengths[i])
            if taken + length <= 1.5 * target:
                chosen[i], taken = 1, taken + length
        if not taken:
            chosen[int(lengths.argmin())] = 1
        return chosen
