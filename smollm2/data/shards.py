"""Shards: files of token ids with a header that says what they hold, and a checksum of the ids.

The header has 256 bytes, little-endian: magic, version, bytes per id, number of ids, number of documents that end in the
shard, vocabulary size, SHA-256 of the tokenizer, SHA-256 of the ids, and zeros.
"""

import hashlib
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from smollm2.data.documents import do_nothing
from smollm2.data.stream import Dtype, Piece, Stream, Tokens
from smollm2.errors import DataError
from smollm2.storage.atomic import sync_file

MAGIC = b"SMOLTOKS"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ32s32s")
HEADER_SIZE = 256
BLOCK = 2**22

MAKE_AGAIN = "delete its folder: the tokens will be made again"


@dataclass(frozen=True)
class Shard:
    """What a store records of a shard."""

    file: str
    tokens: int
    documents: int
    sha256: str


class ShardWriter:
    """Writes the shards of one split, one after another. `written` lists those that are complete.

    The position after the end of each document is appended to `<split>.ends` (uint64) when a shard is complete.
    """

    def __init__(
        self, folder: Path, split: str, vocab_size: int, tokenizer: str, dtype: Dtype, written: list[Shard]
    ) -> None:
        self.folder, self.split, self.written = folder, split, written
        self.vocab_size, self.tokenizer = vocab_size, bytes.fromhex(tokenizer)
        self.itemsize = dtype.itemsize
        self.position = sum(shard.tokens for shard in written)
        ends_before = sum(shard.documents for shard in written)
        self._ends_file = (folder / f"{split}.ends").open("r+b" if ends_before else "w+b")
        self._ends_file.truncate(8 * ends_before)
        self._ends_file.seek(0, 2)
        self._open()

    def _open(self) -> None:
        self.name = f"{self.split}-{len(self.written):05d}.bin"
        self._file = (self.folder / self.name).open("wb")
        self._file.write(b"\0" * HEADER_SIZE)
        self._digest, self._tokens, self._ends = hashlib.sha256(), 0, array("Q")

    def write(self, ids: Tokens, *, ends_document: bool) -> None:
        """Append the ids of a chunk."""
        data = ids.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += len(ids)
        if ends_document:
            self._ends.append(self.position + self._tokens)

    def finish_shard(self, *, is_last: bool = False) -> None:
        """Complete the shard, on disk, and open the next one unless this is the last. An empty shard is dropped."""
        digest = self._digest.digest()
        header = HEADER.pack(
            *(MAGIC, VERSION, self.itemsize, self._tokens, len(self._ends), self.vocab_size),
            *(self.tokenizer, digest),
        )
        self._file.seek(0)
        self._file.write(header)
        self._file.close()
        if self._tokens:
            self._ends_file.write(self._ends.tobytes())
            self._ends_file.flush()
            self.written.append(Shard(self.name, self._tokens, len(self._ends), digest.hex()))
            self.position += self._tokens
            for path in (self.folder / self.name, self.folder / f"{self.split}.ends"):
                sync_file(path)
        else:
            (self.folder / self.name).unlink()
        if not is_last:
            self._open()

    def close(self) -> None:
        """Close the files; what was written after the last complete shard is not used."""
        self._file.close()
        self._ends_file.close()


def open_shards(folder: Path, shards: list[Shard], dtype: Dtype) -> Stream:
    """Return the ids of the shards as one stream. Each shard is checked against the list when it is first read."""
    pieces = [
        Piece(folder, shard.file, shard.tokens, HEADER_SIZE, partial(check_shard, shard=shard, dtype=dtype))
        for shard in shards
    ]
    return Stream(pieces, dtype)


def check_shard(path: Path, shard: Shard, dtype: Dtype) -> None:
    """Raise DataError if a shard's header or size is not that of the list."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(path, f"the shard cannot be read ({error.strerror})", MAKE_AGAIN) from None
    if len(head) < HEADER.size or head[:8] != MAGIC:
        raise DataError(path, "this is not a shard of tokens", MAKE_AGAIN)
    _, version, itemsize, tokens, documents, _, _, digest = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(path, f"the shard has version {version}, not {VERSION}", "use the software that wrote it")
    if (itemsize, tokens, documents, digest.hex()) != (dtype.itemsize, shard.tokens, shard.documents, shard.sha256):
        raise DataError(path, "the shard is not the one that index.json lists", MAKE_AGAIN)
    if size != HEADER_SIZE + tokens * itemsize:
        needed = HEADER_SIZE + tokens * itemsize
        raise DataError(path, f"the shard has {size:,} bytes, not {needed:,}", MAKE_AGAIN)


def verify_shard(path: Path, shard: Shard, dtype: Dtype, stop: Callable[[], None] = do_nothing) -> None:
    """Read a whole shard. Raise DataError if its header is wrong, or its ids do not have its checksum."""
    check_shard(path, shard, dtype)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(HEADER_SIZE)
        while block := file.read(BLOCK):
            stop()
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise DataError(path, "the ids do not have the shard's checksum: the file is damaged", MAKE_AGAIN)
