"""Tokens on disk: cache/<fingerprint>/ holds shards, document ends, the tokenizer and index.json, or does not exist.

The fingerprint covers the text, the tokenizer, the chunk rule and the split, so a cache is never stale. `building.py`
writes the folder. Opening it reads index.json and the sizes of the shards, never the tokens: a shard's header is checked
when it is first read, ids as each window is read, and checksums by `verify`.

Validation: from 20 documents on, whole documents in shards of their own (`documents.py`); with fewer, the end of the
stream. Neither depends on the run's seed: runs with different seeds share a cache and can be compared.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smollm2.data.documents import Source, do_nothing
from smollm2.data.encoding import Encoder
from smollm2.data.shards import HEADER_SIZE, Shard, open_shards, verify_shard
from smollm2.data.stream import Dtype, Stream, choose_dtype
from smollm2.data.text import CHUNK_RULE
from smollm2.data.token_files import TokenFiles
from smollm2.data.windows import WindowSource

STORE_VERSION = 1
FORMAT = "smollm2-tokens/1"
INDEX = "index.json"
UNKNOWN_REPORTED = 0.001

Ends = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Statistics:
    """How much was read, and how many tokens it gave. `tokens` counts one end of text for each document.

    Of token files of another project, only the numbers of tokens are known; the others are 0.
    """

    characters: int
    bytes: int
    documents: int
    blank_documents: int
    tokens: int
    unknown_bytes: int
    unknown_documents: int
    train_tokens: int
    validation_tokens: int

    @property
    def unknown_share(self) -> float:
        """Return the share of the bytes that the tokenizer cannot encode."""
        return self.unknown_bytes / self.bytes

    @property
    def characters_per_token(self) -> float:
        """Return how many characters a token stands for, on average."""
        return self.characters / self.tokens

    def describe(self, train: WindowSource) -> str:
        """Return the line that shows that no part of the corpus is lost."""
        rest = f"{len(train):,} windows of {train.length:,} tokens use {train.tokens_used:,} of {self.train_tokens:,}"
        held_out = f"{self.validation_tokens:,} for validation" if self.validation_tokens else "none for validation"
        split = f"{self.train_tokens:,} for training, {held_out}; {rest}"
        if not self.bytes:
            return f"{self.tokens:,} tokens: {split}"
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        dropped = f" ({self.blank_documents:,} blank dropped)" if self.blank_documents else ""
        unknown = f"{self.unknown_share:.2%}" if self.unknown_bytes else "none"
        return (
            f"{self.characters:,} characters in {documents}{dropped}: {self.tokens:,} tokens "
            f"({self.characters_per_token:.2f} characters per token; unencodable bytes: {unknown}); {split}"
        )

    def describe_unknown(self) -> str:
        """Return the sentence about bytes that the tokenizer cannot encode."""
        return (
            f"the tokenizer cannot encode {self.unknown_share:.2%} of the bytes "
            f"({self.unknown_bytes:,} in {self.unknown_documents:,} of {self.documents:,} documents)"
        )


class Split(NamedTuple):
    """The tokens of one split, and the position after the end of each of its documents."""

    tokens: Stream
    ends: Ends | None  # None if it is not known where documents end


def cut_tail(split: Split, held_out: int) -> tuple[Split, Split]:
    """Return the split without its last `held_out` tokens, and these tokens."""
    stream, ends = split
    border = len(stream) - held_out
    kept, rest = stream.part(0, border), stream.part(border, len(stream))
    if ends is None:
        return Split(kept, None), Split(rest, None)
    whole = ends[: int(np.searchsorted(ends, border))]
    return Split(kept, np.append(whole, np.uint64(border))), Split(rest, ends[len(whole) :] - np.uint64(border))


@dataclass(frozen=True)
class Index:
    """What index.json holds. `held_out` counts the validation tokens at the end of the training shards."""

    fingerprint: str
    vocab_size: int
    tokenizer: str  # its fingerprint
    end_of_text: int
    held_out: int
    statistics: Statistics
    summary: dict[str, Any]  # of the documents
    train: list[Shard]
    validation: list[Shard]
    marks_targets: bool = False  # whether ids are marked that are not targets, as in conversations

    @property
    def dtype(self) -> Dtype:
        """The type of the ids in the shards."""
        return choose_dtype(self.vocab_size, marks=self.marks_targets)

    def to_json(self) -> str:
        """Return the text of index.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Index":
        """Return the index. Raise ValueError, TypeError, KeyError or RecursionError if it is damaged."""
        values = json.loads(text)
        if values.pop("format") != FORMAT:
            raise ValueError(values)
        shards = {split: [Shard(**shard) for shard in values[split]] for split in ("train", "validation")}
        return cls(**{**values, **shards, "statistics": Statistics(**values["statistics"])})


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a corpus, read in place; `validation` is empty if nothing is held out."""

    folder: Path
    index: Index
    files: TokenFiles | None = None  # those of another project, instead of shards; `folder` then holds them
    other: "TokenStore | None" = None  # the tokens of a validation text of its own

    @property
    def fingerprint(self) -> str:
        """What the tokens were made of: text, tokenizer, chunk rule and split."""
        return self.index.fingerprint

    @property
    def vocab_size(self) -> int:
        """The vocabulary size of the tokenizer."""
        return self.index.vocab_size

    @property
    def statistics(self) -> Statistics:
        """How much was read; the validation tokens are those that a run uses."""
        own = self.index.statistics
        return own if self.other is None else replace(own, validation_tokens=len(self.other.train))

    @cached_property
    def splits(self) -> tuple[Split, Split]:
        """The training and the validation split of this text."""
        index = self.index
        if self.files is not None:
            return cut_tail(Split(self.files.stream, self.files.ends), index.held_out)
        stream = open_shards(self.folder, index.train, index.dtype)
        if index.held_out:
            return cut_tail(Split(stream, self.read_ends("train")), index.held_out)
        held_out = open_shards(self.folder, index.validation, index.dtype)
        return Split(stream, self.read_ends("train")), Split(held_out, self.read_ends("validation"))

    def read_ends(self, split: str) -> Ends:
        """Return the position after the end of each document in the shards of a split."""
        path = self.folder / f"{split}.ends"
        return np.memmap(path, "<u8", "r") if path.stat().st_size else np.zeros(0, np.uint64)

    @property
    def train(self) -> Stream:
        """The tokens to train on."""
        return self.splits[0].tokens

    @property
    def validation(self) -> Stream:
        """The tokens that are held out, or those of the validation text."""
        return self.splits[1].tokens if self.other is None else self.other.train

    def with_validation(self, other: "TokenStore") -> "TokenStore":
        """Return the same store with the tokens of another text as its validation text."""
        return replace(self, other=other)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what to report to the user."""
        s = self.index.statistics
        return (s.describe_unknown(),) if s.bytes and s.unknown_share > UNKNOWN_REPORTED else ()

    def verify(self, stop: Callable[[], None] = do_nothing) -> int:
        """Read all shards and return their number. Raise DataError for the first whose ids lack its checksum."""
        shards = [*self.index.train, *self.index.validation]
        for shard in shards:
            verify_shard(self.folder / shard.file, shard, self.index.dtype, stop)
        return len(shards) + (self.other.verify(stop) if self.other else 0)


def fingerprint_of(text: Source, tokenizer: Encoder, fraction: float) -> str:
    """Return the fingerprint of the tokens of a text."""
    rule = [STORE_VERSION, CHUNK_RULE, text.sha256, tokenizer.fingerprint, text.separator, fraction]
    if text.blank_characters:  # version 0.1.0 kept documents of white space; texts without any keep its fingerprint
        rule.append("without blank documents")
    if text.documents.is_split(fraction):  # version 0.1.0 chose them by their positions
        rule.append("split by hash")
    if tokenizer.begin or not tokenizer.cuts_documents:  # version 0.2.0 added nothing, and always cut
        rule.append("documents as their tokenizer encodes them")
    if tokenizer.closing not in ([], [tokenizer.end_of_text]):  # version 0.2.0 ended documents with the end of a turn
        rule.append(tokenizer.closing)
    return hashlib.sha256(json.dumps(rule).encode()).hexdigest()


def open_tokens(folder: Path) -> TokenStore | None:
    """Return the tokens in `folder`, or None if it is absent or its index and the sizes of its files do not agree."""
    try:
        index = Index.from_json((folder / INDEX).read_text(encoding="utf-8"))
        itemsize = index.dtype.itemsize
        sizes = {shard.file: HEADER_SIZE + shard.tokens * itemsize for shard in (*index.train, *index.validation)}
        for split, shards in (("train", index.train), ("validation", index.validation)):
            sizes[f"{split}.ends"] = 8 * sum(shard.documents for shard in shards)
        found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        is_whole = all(found.get(name) == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return TokenStore(folder, index) if is_whole else None
