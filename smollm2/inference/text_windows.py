"""A text of any length as windows that hold each target once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from smollm2.data.text import Chunk, open_text, split_documents
from smollm2.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Row:
    """Up to length + 1 tokens of a document; the first `context` targets were scored in the row before."""

    document: int
    ids: list[int]
    context: int


class CountedEncoder:
    """A tokenizer that remembers how many bytes it could not express."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.unexpressed = tokenizer, 0

    def encode(self, text: str) -> list[int]:
        """The ids of a piece."""
        ids, lost = self.tokenizer.encode_counted(text)
        self.unexpressed += lost
        return ids


def open_pieces(
    text_or_path: str | Path, separator: str | None, spool: Path, report: Callable[[str], None]
) -> Iterator[Chunk]:
    """The documents of a text or a file, in pieces, as training reads them. Raises DataError."""
    if isinstance(text_or_path, Path):
        text = open_text(str(text_or_path), spool, separator)
        for note in text.notes:
            report(note)
        return text.chunks()
    return split_documents(iter([text_or_path]), separator)


def cut_rows(
    pieces: Iterator[Chunk], encoder: CountedEncoder, length: int, stride: int, *, per_document: bool
) -> Iterator[Row]:
    """The text as rows that hold each target once: of one stream, or of each document by itself."""
    end = encoder.tokenizer.end_of_text

    def blocks(numbered: Iterator[tuple[int, Chunk]]) -> Iterator[list[int]]:
        for _, piece in numbered:
            yield encoder.encode(piece.text) + ([end] if piece.last else [])

    numbered = number_pieces(pieces)
    if not per_document:
        yield from slide(0, blocks(numbered), length, stride)
        return
    for number, document in groupby(numbered, key=lambda pair: pair[0]):
        yield from slide(number, chain([[end]], blocks(document)), length, stride)


def number_pieces(pieces: Iterator[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Each piece with the number of its document."""
    number = 0
    for piece in pieces:
        yield number, piece
        number += piece.last


def slide(document: int, blocks: Iterable[list[int]], length: int, stride: int) -> Iterator[Row]:
    """A window of length + 1 tokens every `stride` tokens; only what the windows still need is held."""
    held: list[int] = []
    context = 0
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > length:
            yield Row(document, held[start : start + length + 1], context)
            start, context = start + stride, length - stride
        del held[:start]
    if len(held) - 1 > context:
        yield Row(document, held, context)
