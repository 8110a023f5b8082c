"""Split a text of any length into a stream of windows in which each target is scored once.

Only the tokens that later windows still need are kept in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from smollm2.data.chat import ChatEncoder, choose_template
from smollm2.data.documents import Chunk
from smollm2.data.encoding import Encoder, Part, arrange
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

    def __init__(self, tokenizer: Encoder) -> None:
        self.tokenizer, self.unencodable_bytes = tokenizer, 0

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids, lost = self.tokenizer.encode_counted(text)
        self.unencodable_bytes += lost
        return ids


def open_chunks(
    text_or_path: str | Path, rules: Rules, spool: Path, report: Callable[[str], None]
) -> tuple[Iterator[Chunk], bool]:
    """Return the documents of a text or a file in chunks, as training reads them, and whether they are conversations.

    Raise DataError if the file cannot be used.
    """
    if isinstance(text_or_path, Path):
        text = open_input(str(text_or_path), spool, rules, report=report)
        for note in text.notes:
            report(note)
        return text.chunks(), text.is_chat
    return split_documents(iter([text_or_path]), rules.separator), False


def chat_encoder(tokenizer: Tokenizer, train_on: str, name: str | Path) -> ChatEncoder:
    """Return the encoder of the conversations in the file `name`. Raise DataError without a chat template."""
    if not tokenizer.chat_template:
        what = "these are conversations, and the model has no chat template: it was trained on plain text"
        raise DataError(name, what, "train the model on conversations first, or choose a plain text")
    return ChatEncoder(choose_template(tokenizer), train_on)


def cut_windows(
    chunks: Iterator[Chunk], encoder: CountedEncoder, length: int, stride: int, *, per_document: bool
) -> Iterator[TextWindow]:
    """Yield the windows of the whole stream, or of each document separately if `per_document`, as always for conversations.

    Ids of conversations that are not targets are marked (`MARK`).
    """
    begin, closing, is_chat = encoder.tokenizer.begin, encoder.tokenizer.closing, encoder.tokenizer.marks_targets

    def blocks(numbered: Iterator[tuple[int, Part]]) -> Iterator[list[int]]:
        for _, part in numbered:
            yield begin * part.first + encoder.encode(part.text) + closing * part.last

    numbered = number_parts(arrange(chunks, cuts=encoder.tokenizer.cuts_documents))
    if not per_document and not is_chat:
        yield from slide(0, blocks(numbered), length, stride)
        return
    for number, document in groupby(numbered, key=lambda pair: pair[0]):
        before = [] if begin or is_chat else closing
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
