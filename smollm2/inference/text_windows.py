"""Split a text of any length into a stream of windows in which each target is scored once.

Only the tokens that later windows still need are kept in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from smollm2.data.documents import Chunk
from smollm2.data.encoding import Part, arrange
from smollm2.data.sources import Rules, open_input
from smollm2.data.text import split_documents
from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import DataError


@dataclass(frozen=True)
class TextWindow:
    """Up to length + 1 tokens of a document; the first `context` targets were scored in the previous window."""

    document: int
    ids: list[int]
    context: int


class CountedEncoder:
    """A tokenizer that counts the bytes it cannot encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.unencodable_bytes = tokenizer, 0

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids, lost = self.tokenizer.encode_counted(text)
        self.unencodable_bytes += lost
        return ids


def open_chunks(
    text_or_path: str | Path, separator: str | None, spool: Path, report: Callable[[str], None]
) -> Iterator[Chunk]:
    """Return the documents of a text or a file in chunks, as training reads them.

    Raise DataError if the file cannot be used.
    """
    if isinstance(text_or_path, Path):
        text = open_input(str(text_or_path), spool, Rules(separator), report=report)
        for note in text.notes:
            report(note)
        if text.is_chat:
            what = "these are conversations, not plain text"
            raise DataError(
                text_or_path, what, "train with eval_interval to measure the loss of answers, or choose a text"
            )
        return text.chunks()
    return split_documents(iter([text_or_path]), separator)


def cut_windows(
    chunks: Iterator[Chunk], encoder: CountedEncoder, length: int, stride: int, *, per_document: bool
) -> Iterator[TextWindow]:
    """Yield the windows of the whole stream, or of each document separately if `per_document`."""
    end, begin = encoder.tokenizer.end_of_text, encoder.tokenizer.begin

    def blocks(numbered: Iterator[tuple[int, Part]]) -> Iterator[list[int]]:
        for _, part in numbered:
            yield begin * part.first + encoder.encode(part.text) + [end] * part.last

    numbered = number_parts(arrange(chunks, cuts=encoder.tokenizer.cuts_documents))
    if not per_document:
        yield from slide(0, blocks(numbered), length, stride)
        return
    for number, document in groupby(numbered, key=lambda pair: pair[0]):
        before = [] if begin else [end]
        yield from slide(number, chain([before], blocks(document)), length, stride)


def number_parts(parts: Iterator[Part]) -> Iterator[tuple[int, Part]]:
    """Yield (document number, part) for each part."""
    number = 0
    for part in parts:
        yield number, part
        if part.last:
            number += 1


def slide(document: int, blocks: Iterable[list[int]], length: int, stride: int) -> Iterator[TextWindow]:
    """Yield a window of length + 1 tokens every `stride` tokens; the last one may be shorter."""
    held: list[int] = []
    context = 0
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > length:
            yield TextWindow(document, held[start : start + length + 1], context)
            start, context = start + stride, length - stride
        del held[:start]
    if len(held) - 1 > context:
        yield TextWindow(document, held, context)
