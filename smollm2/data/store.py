"""Tokens on disk: cache/<fingerprint>/ holds train.bin, validation.bin and header.json, or does not exist.

The fingerprint covers the text, the tokenizer, the chunk rule and the split, so a cache is never stale. Each is built
in a temporary folder, synced, renamed. Opening it reads a header and two sizes, never the tokens: ids are checked when
they are written and again as each window is read. Ids are little-endian uint16 up to 65,536 entries, else uint32.

Validation: from 20 documents on, whole documents in a fixed random order until the fraction is reached; with fewer,
the tail of the stream. Neither depends on the run's seed: runs with different seeds share a cache and can be compared.
"""

import hashlib
import json
import os
import shutil
import socket
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from smollm2.data.batches import permute
from smollm2.data.text import CHUNK_RULE, Source, do_nothing, expand_home
from smollm2.data.windows import Tokens, Windows
from smollm2.errors import DataError, ResourceError
from smollm2.storage.atomic import IO_OPS, sync_file
from smollm2.storage.processes import is_running

STORE_VERSION = 1
SPLIT_KEY = 0
DOCUMENTS_FOR_SPLIT = 20
UNKNOWN_REPORTED, UNKNOWN_REFUSED = 0.001, 0.05
BLOCK = 2**20

MIN_VALIDATION_TOKENS = 3
"""With fewer, the only target is an end of text, which stands for no byte: bits per byte would be undefined."""


class Encoder(Protocol):
    """What the store needs of a tokenizer."""

    vocab_size: int
    end_of_text: int
    fingerprint: str

    def encode_counted(self, text: str) -> tuple[list[int], int]:
        """Return the ids of `text`, and how many of its bytes they do not represent."""
        ...


@dataclass(frozen=True)
class Statistics:
    """How much was read, and how many tokens it gave. `tokens` counts one end of text for each document."""

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

    def describe(self, train: Windows) -> str:
        """Return the line that shows that no part of the corpus is lost."""
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        dropped = f" ({self.blank_documents:,} blank dropped)" if self.blank_documents else ""
        unknown = f"{self.unknown_share:.2%}" if self.unknown_bytes else "none"
        validation = f"{self.validation_tokens:,} for validation" if self.validation_tokens else "none for validation"
        return (
            f"{self.characters:,} characters in {documents}{dropped}: {self.tokens:,} tokens "
            f"({self.characters_per_token:.2f} characters per token; unencodable bytes: {unknown}); "
            f"{self.train_tokens:,} for training, {validation}; {len(train):,} windows of {train.length:,} tokens "
            f"use {train.tokens_used:,} of {len(train.tokens):,}"
        )


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a corpus, memory-mapped; `validation` is empty if nothing is held out."""

    folder: Path
    fingerprint: str
    vocab_size: int
    train: Tokens
    validation: Tokens
    statistics: Statistics
    validation_folder: Path | None = None  # of a validation text of its own

    def with_validation(self, other: "TokenStore") -> "TokenStore":
        """Return the same store with the tokens of another text as its validation text."""
        statistics = replace(self.statistics, validation_tokens=len(other.train))
        return replace(self, validation=other.train, statistics=statistics, validation_folder=other.folder)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what to report to the user."""
        s = self.statistics
        return (_describe_unknown(s),) if s.unknown_share > UNKNOWN_REPORTED else ()


def prepare_tokens(
    text: Source,
    tokenizer: Encoder,
    cache_dir: Path,
    validation_fraction: float,
    *,
    show_progress: Callable[[float], None] = lambda fraction: None,
    stop: Callable[[], None] = do_nothing,
) -> TokenStore:
    """Return the tokens of `text`, from the cache, or encoded and then cached. `stop` is called often and may raise.

    Adds at most 300 MB to the memory of the process, for a text of any size. Raise DataError if the tokenizer cannot
    represent the text, ResourceError if the cache cannot be written.
    """
    rule = [STORE_VERSION, CHUNK_RULE, text.sha256, tokenizer.fingerprint, text.separator, validation_fraction]
    if text.blank_characters:  # version 0.1.0 kept documents of white space; texts without any keep its fingerprint
        rule.append("without blank documents")
    fingerprint = hashlib.sha256(json.dumps(rule).encode()).hexdigest()
    cache_dir = expand_home(cache_dir)
    folder = cache_dir / fingerprint
    try:
        if (store := open_tokens(folder)) is None:
            _build(text, tokenizer, folder, validation_fraction, show_progress, stop)
            store = open_tokens(folder)
    except OSError as error:
        advice = "free some space, or set data.cache_dir to a writable folder"
        raise ResourceError(cache_dir, f"the tokens cannot be written there ({error.strerror})", advice) from None
    assert store is not None
    return store


def open_tokens(folder: Path) -> TokenStore | None:
    """Return the tokens in `folder`, or None if it is absent or its header and sizes do not agree."""
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        statistics = Statistics(**header["statistics"])
        counts = {"train.bin": statistics.train_tokens, "validation.bin": statistics.validation_tokens}
        dtype = _choose_dtype(header["vocab_size"])
        whole = all((folder / name).stat().st_size == count * dtype.itemsize for name, count in counts.items())
        if not whole or header["fingerprint"] != folder.name:
            return None
        train, validation = (
            np.memmap(folder / name, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
            for name, count in counts.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return TokenStore(folder, folder.name, header["vocab_size"], train, validation, statistics)


def _build(
    text: Source,
    tokenizer: Encoder,
    folder: Path,
    fraction: float,
    show_progress: Callable[[float], None],
    stop: Callable[[], None],
) -> None:
    """Build `folder` atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    work = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    work.mkdir()
    try:
        dtype = _choose_dtype(tokenizer.vocab_size)
        with (work / "train.bin").open("wb") as file:
            lengths, counts = _write_tokens(text, tokenizer, file, dtype, show_progress, stop)
        held_out = _split(work, lengths, fraction, dtype.itemsize, stop)
        statistics = Statistics(**counts, train_tokens=sum(lengths) - held_out, validation_tokens=held_out)
        header = {"vocab_size": tokenizer.vocab_size, "fingerprint": folder.name, "statistics": asdict(statistics)}
        (work / "header.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        for file_path in work.iterdir():
            _sync(file_path)
        if folder.exists() and open_tokens(folder) is None:  # damaged
            shutil.rmtree(folder)
        if not folder.exists():  # otherwise another run was faster
            work.rename(folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_tokens(
    text: Source,
    tokenizer: Encoder,
    file: IO[bytes],
    dtype: np.dtype[np.uint16] | np.dtype[np.uint32],
    show_progress: Callable[[float], None],
    stop: Callable[[], None],
) -> "tuple[array[int], dict[str, int]]":
    """Write all ids in the order of the text; return the number of tokens of each document, and the counts."""
    lengths: array[int] = array("Q")
    length = characters = unknown = unknown_here = unknown_documents = 0
    for chunk in text.chunks(stop):
        ids, lost = tokenizer.encode_counted(chunk.text)
        if chunk.last:
            ids = [*ids, tokenizer.end_of_text]
        if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            what = f"the tokenizer produced an id outside its vocabulary of {tokenizer.vocab_size:,}"
            raise DataError(text.name, what, "use another tokenizer")
        file.write(np.array(ids, dtype).tobytes())
        length, unknown_here, characters = length + len(ids), unknown_here + lost, characters + len(chunk.text)
        if chunk.last:
            lengths.append(length)
            unknown, unknown_documents = unknown + unknown_here, unknown_documents + (unknown_here > 0)
            length = unknown_here = 0
        show_progress(characters / text.characters)
    counts = {
        "characters": characters,
        "bytes": text.size,
        "documents": len(lengths),
        "blank_documents": text.blank_documents,
        "tokens": sum(lengths),
        "unknown_bytes": unknown,
        "unknown_documents": unknown_documents,
    }
    if unknown / text.size > UNKNOWN_REFUSED:
        what = _describe_unknown(Statistics(**counts, train_tokens=0, validation_tokens=0))
        raise DataError(text.name, what, "use another tokenizer, such as `auto` or `bytes`")
    return lengths, counts


def _split(work: Path, lengths: "array[int]", fraction: float, itemsize: int, stop: Callable[[], None]) -> int:
    """Move the validation tokens from train.bin to validation.bin; return their number."""
    train, validation, total = work / "train.bin", work / "validation.bin", sum(lengths)
    validation.touch()
    if fraction == 0:
        return 0
    if len(lengths) < DOCUMENTS_FOR_SPLIT:
        held_out = max(MIN_VALIDATION_TOKENS, round(total * fraction))
        if total - held_out < 2:
            return 0
        with train.open("rb+") as file, validation.open("wb") as tail:
            file.seek((total - held_out) * itemsize)
            shutil.copyfileobj(file, tail, BLOCK)
            file.truncate((total - held_out) * itemsize)
        return held_out
    chosen = _choose_documents(lengths, max(MIN_VALIDATION_TOKENS, total * fraction))
    everything = train.rename(work / "all.bin")
    with everything.open("rb") as source, train.open("wb") as kept, validation.open("wb") as held:
        for i, length in enumerate(lengths):
            _copy(source, held if chosen[i] else kept, length * itemsize, stop)
    everything.unlink()
    return sum(length for i, length in enumerate(lengths) if chosen[i])


def _choose_documents(lengths: "array[int]", target: float) -> bytearray:
    """Return 1 for each validation document, else 0. One that would bring the total over 1.5 x target is skipped.

    At least one is chosen, and never all: the shortest of 20 is at most a twentieth of the text.
    """
    chosen, taken, count = bytearray(len(lengths)), 0, len(lengths)
    for first in range(0, count, BLOCK):
        order = permute(np.arange(first, min(count, first + BLOCK)), count, np.uint64(SPLIT_KEY))
        for i in order.tolist():
            if taken >= target:
                return chosen
            if taken + lengths[i] <= 1.5 * target:
                chosen[i], taken = 1, taken + lengths[i]
    if not taken:
        chosen[min(range(count), key=lengths.__getitem__)] = 1
    return chosen


def _copy(source: IO[bytes], target: IO[bytes], size: int, stop: Callable[[], None]) -> None:
    stop()
    while size:
        block = source.read(min(size, BLOCK))
        target.write(block)
        size -= len(block)


def _choose_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _describe_unknown(s: Statistics) -> str:
    return (
        f"the tokenizer cannot encode {s.unknown_share:.2%} of the bytes "
        f"({s.unknown_bytes:,} in {s.unknown_documents:,} of {s.documents:,} documents)"
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs on this machine left behind while building `folder`."""
    for leftover in folder.parent.glob(f".{folder.name}.{socket.gethostname()}.*"):
        pid = leftover.suffix[1:]
        if pid.isdecimal() and (int(pid) == os.getpid() or not is_running(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file or a folder survive a power cut."""
    if path.is_dir():
        IO_OPS.fsync_dir(path)
    else:
        sync_file(path)
