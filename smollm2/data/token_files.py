"""Token files that other projects wrote: read in place through memory maps, never copied.

| format | layout | source |
|---|---|---|
| nanoGPT `.bin` | uint16 ids, no header | nanoGPT `data/openwebtext/prepare.py` |
| llm.c `.bin` | 256 int32 (magic, version, number of tokens), then uint16 (GPT-2) or uint32 ids (Llama 3) | llm.c `dev/data/data_common.py` |
| datatrove `.ds` | uint16 or uint32 ids; `.ds.index`: uint64 document ends; `.ds.metadata`: text | datatrove `pipeline/tokens/tokenizer.py` |

modded-nanogpt's `.bin` files are those of llm.c. All numbers are little-endian. Nothing in a `.bin` file without a header
tells what it is: its ids are compared with the vocabulary when windows are read.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smollm2.data.stream import Dtype, Piece, Stream
from smollm2.errors import DataError
from smollm2.storage.input_files import check_regular

ENDINGS = (".bin", ".ds")

UINT16, UINT32, UINT64 = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u8")
Ends = npt.NDArray[np.uint64]

HEADER_BYTES = 256 * 4
HEADERS: dict[int, tuple[int, Dtype]] = {20240520: (1, UINT16), 20240801: (7, UINT32)}
"""The version and the type of the ids for each magic number. A headerless file would begin with one of them only if its
first ids were 55,432 or 55,713 and then 308: both are outside the vocabulary of GPT-2."""

FOREIGN = {b"PK\x03\x04": "a zip archive, such as a PyTorch model", b"\x8a\xd8\x34\x01": "an evaluation file of llm.c"}
"""Files whose names end in `.bin` too, by their first bytes."""

METADATA_BYTES = 2**16
UNKNOWN_TOKENIZER = "Unknown Tokenizer"

BLOCK = 2**12
SAMPLED_BLOCKS = 256
"""Blocks that the fingerprint covers, over all files; of each file at least two, the first and the last."""

SAMPLED_ENDS = 64

TRUNCATED = "copy the file again"


@dataclass(frozen=True)
class TokenFiles:
    """Token files of one format, memory-mapped: `arrays` are their ids, each (tokens of the file,), in the given order.

    `indexes` are the document ends within each file, each (documents of the file,), or None if a file has no index.
    `fingerprint` covers the sizes and evenly spaced samples: it does not notice a change between two samples.
    """

    arrays: tuple[np.memmap[Any, Dtype], ...]
    indexes: tuple[Ends, ...] | None
    format: str
    tokenizer_name: str | None
    fingerprint: str

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    @property
    def stream(self) -> Stream:
        """Return the ids of all files, one after another."""
        paths = [Path(str(array.filename)) for array in self.arrays]
        pieces = [Piece(p.parent, p.name, len(a), a.offset) for p, a in zip(paths, self.arrays, strict=True)]
        return Stream(pieces, self.dtype)

    @property
    def dtype(self) -> Dtype:
        """Return the type of the ids."""
        return self.arrays[0].dtype

    @cached_property
    def ends(self) -> Ends | None:
        """Return the document ends over the concatenation of all files, (documents,), or None without indexes.

        With one file it is the mapped index. With several it takes 8 bytes of memory per document.
        """
        if self.indexes is None or len(self.indexes) == 1:
            return self.indexes[0] if self.indexes else None
        starts = np.cumsum([0, *map(len, self.arrays[:-1])], dtype=np.uint64)
        return np.concatenate([index + start for index, start in zip(self.indexes, starts, strict=True)])


@dataclass(frozen=True)
class Layout:
    """Where the ids of one file are, according to its header, its metadata, its index and its size."""

    path: Path
    format: str
    dtype: Dtype
    offset: int  # in bytes
    count: int
    index: Ends | None = None
    tokenizer_name: str | None = None


def is_token_file(path: Path) -> bool:
    """Return whether the name is that of a token file: it ends in `.bin` or `.ds`."""
    return path.suffix.lower() in ENDINGS


def open_token_files(paths: Sequence[Path]) -> TokenFiles:
    """Map token files of one format. Only headers, metadata, sizes and samples of bounded size are read.

    Raise DataError if a file is not a token file, is damaged, or differs from the first one in its format, the type of
    its ids or its tokenizer.
    """
    assert paths
    layouts = [read_layout(path) for path in paths]
    first = layouts[0]
    for other in layouts[1:]:
        for name, ours, theirs in (
            ("format", first.format, other.format),
            ("ids", first.dtype.name, other.dtype.name),
            ("tokenizer", first.tokenizer_name, other.tokenizer_name),
        ):
            if ours != theirs:
                what = (
                    f"its {name} ({theirs or 'unknown'}) and that of {first.path} ({ours or 'unknown'}) are different"
                )
                raise DataError(other.path, what, "name files of one kind in each input")
    indexes = tuple(one.index for one in layouts if one.index is not None)
    return TokenFiles(
        arrays=tuple(np.memmap(one.path, one.dtype, "r", one.offset, (one.count,)) for one in layouts),
        indexes=indexes if len(indexes) == len(layouts) else None,
        format=first.format,
        tokenizer_name=first.tokenizer_name,
        fingerprint=fingerprint(layouts),
    )


def read_layout(path: Path) -> Layout:
    """Return the layout of one file. Raise DataError if it is not a token file, is empty or is damaged."""
    if not is_token_file(path):
        raise DataError(path, "this is not a token file", f"name files that end in {' or '.join(ENDINGS)}")
    check_regular(path)
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError(path, "the file is empty", TRUNCATED)
        return read_ds(path, size) if path.suffix.lower() == ".ds" else read_bin(path, size)
    except OSError as error:
        raise DataError(path, f"the file cannot be read ({error.strerror})", "check its permissions") from None


def read_bin(path: Path, size: int) -> Layout:
    """Return the layout of a `.bin` file: llm.c's if it begins with one of its magic numbers, otherwise nanoGPT's."""
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if (kind := FOREIGN.get(start[:4])) is not None:
        raise DataError(path, f"this is {kind}, not a token file", "name a file of token ids")
    magic, version, count = (int.from_bytes(start[at : at + 4], "little", signed=True) for at in (0, 4, 8))
    if len(start) < 4 or magic not in HEADERS:
        return Layout(path, "nanoGPT .bin", UINT16, 0, count_items(path, size, UINT16))
    known, dtype = HEADERS[magic]
    if version != known and len(start) == HEADER_BYTES:
        what = f"its header has version {version}, but only version {known} of this format (magic {magic}) is known"
        raise DataError(path, what, "write it again with the current llm.c or modded-nanogpt")
    if len(start) < HEADER_BYTES or size - HEADER_BYTES != count * dtype.itemsize or count <= 0:
        what = f"its header announces {count:,} tokens ({HEADER_BYTES + count * dtype.itemsize:,} bytes), but it has {size:,} bytes"
        raise DataError(path, what, TRUNCATED)
    return Layout(path, "llm.c .bin", dtype, HEADER_BYTES, count)


def read_ds(path: Path, size: int) -> Layout:
    """Return the layout of a `.ds` file and its index. Without metadata, ids have two bytes, unless the index ends at the
    number of tokens that they are with four."""
    name, itemsize, announced = read_metadata(path)
    index = read_index(path)
    if itemsize is None:
        itemsize = 4 if index is not None and int(index[-1]) * 4 == size else 2
    dtype: Dtype = UINT32 if itemsize == 4 else UINT16
    count = count_items(path, size, dtype)
    found = {f"{path.name}.metadata": announced, f"{path.name}.index": None if index is None else int(index[-1])}
    for beside, number in found.items():
        if number not in (None, count):
            what = f"it has {count:,} tokens of {itemsize} bytes, but according to {beside} it has {number:,}"
            raise DataError(path, what, "copy both files again")
    return Layout(path, "datatrove .ds", dtype, 0, count, index, name)


def read_metadata(path: Path) -> tuple[str | None, int | None, int | None]:
    """Return (tokenizer, bytes per id, number of tokens) from `.ds.metadata`, each None if it is not given there.

    The first line is the tokenizer's name or path, in newer versions followed by `|2` or `|4`; the second is the number.
    """
    beside = path.with_name(f"{path.name}.metadata")
    try:
        with beside.open("rb") as file:
            first, second, *_ = [*file.read(METADATA_BYTES).decode().splitlines(), "", ""]
        name, bar, itemsize = first.rpartition("|")
        if bar and itemsize not in ("2", "4"):
            raise ValueError(itemsize)
        name = name if bar else first
        known = name if name and not name.startswith(UNKNOWN_TOKENIZER) else None
        return known, int(itemsize) if bar else None, int(second)
    except FileNotFoundError:
        return None, None, None
    except ValueError:
        what = "this is not the metadata of a .ds file: `tokenizer|2` or `tokenizer|4`, then the number of tokens"
        raise DataError(beside, what, "copy the file again, or remove it if the ids have two bytes") from None


def read_index(path: Path) -> Ends | None:
    """Map `.ds.index`, the document ends of a `.ds` file; None if there is none. Raise DataError if it is damaged."""
    beside = path.with_name(f"{path.name}.index")
    if not beside.exists():
        return None
    size = beside.stat().st_size
    if size == 0:
        raise DataError(beside, "the file is empty", TRUNCATED)
    index: Ends = np.memmap(beside, UINT64, "r", shape=(count_items(beside, size, UINT64),))
    points = np.linspace(0, len(index) - 1, SAMPLED_ENDS).astype(np.int64)
    points = np.unique([*points, *(points[:-1] + 1).clip(max=len(index) - 1)])  # with neighbours
    falls = np.flatnonzero(index[points[1:]] < index[points[:-1]])
    if len(falls):
        before, after = points[falls[0]], points[falls[0] + 1]
        what = (
            f"document {after:,} ends at token {index[after]:,}, before document {before:,} (token {index[before]:,})"
        )
        raise DataError(beside, what, TRUNCATED)
    return index


def count_items(path: Path, size: int, dtype: Dtype | np.dtype[np.uint64]) -> int:
    """Return the number of items of a file. Raise DataError if its last item is incomplete."""
    if size % dtype.itemsize:
        what = f"its size ({size:,} bytes) is not a multiple of {dtype.itemsize} bytes ({dtype.name})"
        raise DataError(path, what, TRUNCATED)
    return size // dtype.itemsize


def fingerprint(layouts: Sequence[Layout]) -> str:
    """Return a SHA-256 over the sizes of the files and of their indexes, and over blocks evenly spaced in each of them."""
    found = hashlib.sha256()
    limit = max(2, SAMPLED_BLOCKS // len(layouts))
    for one in layouts:
        index = [] if one.index is None else [one.path.with_name(f"{one.path.name}.index")]
        found.update(f"{one.format}|{one.dtype.str}|{len(index)}|".encode())
        for path in (one.path, *index):
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                blocks = min(limit, -(-size // BLOCK))
                found.update(f"{size}|".encode())
                for i in range(blocks):
                    file.seek(i * (size - BLOCK) // (blocks - 1) if blocks > 1 else 0)
                    found.update(file.read(BLOCK))
    return found.hexdigest()
