"""Encode the chunks of a text on all cores, in the order of the text: the result does not depend on the number of workers.

The workers are threads: both encoders run outside Python's lock. A bounded number of chunks is in memory at a time.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from smollm2.data.documents import Chunk
from smollm2.data.stream import MARK, Dtype, Tokens, choose_dtype
from smollm2.errors import DataError

BATCH = 2**16
"""Characters that a worker encodes at a time: many short documents, or one chunk of a long one."""

WAITING = 3
"""Batches per worker that are read ahead."""


class Encoder(Protocol):
    """What the store needs of a tokenizer."""

    text: str
    vocab_size: int
    end_of_text: int
    fingerprint: str
    begin: list[int]  # put before each document
    closing: list[int]  # put after each document
    cuts_documents: bool  # whether the cuts between the chunks of a document change no token
    marks_targets: bool  # whether `MARK` is added to ids that are not targets

    def encode_counted(self, text: str) -> tuple[list[int], int]:
        """Return the ids of `text`, and how many of its bytes they do not represent."""
        ...


class Part(NamedTuple):
    """A chunk, or a whole document. `first` and `last` tell whether a document begins and ends with it."""

    text: str
    first: bool
    last: bool


class Encoded(NamedTuple):
    """The ids of a part. A document begins with the ids that the tokenizer puts before a text, and ends with an end of
    text."""

    ids: Tokens
    characters: int
    unknown_bytes: int  # bytes of the text that the ids do not represent
    last: bool  # whether the document ends here


def arrange(chunks: Iterable[Chunk], *, cuts: bool) -> Iterator[Part]:
    """Yield the parts that a tokenizer encodes one by one: chunks, or whole documents unless `cuts`."""
    first, held = True, ""
    for text, last in chunks:
        if cuts:
            yield Part(text, first, last)
            first = last
        else:
            held += text
            if last:
                yield Part(held, True, True)
                held = ""


def encode_in_order(chunks: Iterable[Part], tokenizer: Encoder, workers: int, name: str) -> Generator[Encoded]:
    """Yield the ids of each part, in order.

    Raise DataError with `name` in it if the tokenizer gives an id outside its vocabulary.
    """
    dtype = choose_dtype(tokenizer.vocab_size, marks=tokenizer.marks_targets)
    waiting: deque[Future[list[Encoded]]] = deque()
    pool = ThreadPoolExecutor(workers, "encoding")
    try:
        for batch in group_chunks(chunks):
            waiting.append(pool.submit(encode_batch, batch, tokenizer, dtype, name))
            if len(waiting) > WAITING * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def group_chunks(chunks: Iterable[Part]) -> Iterator[list[Part]]:
    """Yield lists of consecutive parts of at least `BATCH` characters together, the last one excepted."""
    batch: list[Part] = []
    characters = 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_batch(batch: list[Part], tokenizer: Encoder, dtype: Dtype, name: str) -> list[Encoded]:
    """Return the ids of each part of a batch."""
    return [encode_chunk(chunk, tokenizer, dtype, name) for chunk in batch]


def encode_chunk(chunk: Part, tokenizer: Encoder, dtype: Dtype, name: str) -> Encoded:
    """Return the ids of a part."""
    ids, lost = tokenizer.encode_counted(chunk.text)
    if chunk.first and tokenizer.begin:
        ids = [*tokenizer.begin, *ids]
    if chunk.last:
        ids = [*ids, *tokenizer.closing]
    plain = [i % MARK for i in ids] if tokenizer.marks_targets else ids
    if ids and not 0 <= min(plain) <= max(plain) < tokenizer.vocab_size:
        what = f"the tokenizer produced an id outside its vocabulary of {tokenizer.vocab_size:,}"
        raise DataError(name, what, "use another tokenizer")
    return Encoded(np.array(ids, dtype), len(chunk.text), lost, chunk.last)
