"""A text file, checked once and then streamed in pieces: bounded memory, the same pieces whatever the read size.

`open_text` reads the file once: is it UTF-8, what is its sha256. `Text.pieces` reads it again and stops if it changed.
A document is cut into pieces of at least 64 Ki characters, after a newline or before a space that stands alone between
two characters that are no spaces: there a ByteLevel tokenizer, with or without Digits, makes the same tokens with and
without the cut. Where 128 Ki characters hold no such place the cut falls there, and may change the tokens around it.
"""

import codecs
import hashlib
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from smollm2.errors import DataError, ResourceError

PIECE_RULE = 1
"""Goes up when the pieces, and so perhaps the tokens, of a text change."""

PIECE = 2**16
LONGEST_PIECE = 2**17
CUT = re.compile(r"(?<=\S)\n(?=\S)|(?<=\S)(?= \S)")

BLOCK = 2**20
END_OF_TEXT = "<|endoftext|>"

KINDS = (
    (rb"\x1f\x8b", "a gzip file", "unpack it with gunzip"),
    (rb"PK\x03\x04", "a zip file (or .docx, .epub, .pt)", "unpack or convert it to plain text"),
    (rb"%PDF-", "a PDF file", "convert it, for example with pdftotext"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with zstd -d"),
    (rb"BZh[1-9]1AY&SY", "a bzip2 file", "unpack it with bunzip2"),
    (rb"\xfd7zXZ\x00", "an xz file", "unpack it with xz -d"),
    (rb"PAR1", "a parquet file", "convert it to plain text"),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32 text", "convert it with iconv -f UTF-32 -t UTF-8"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    (rb"(?s)(?:[^\0]\0){8}", "UTF-16 text", "convert it with iconv -f UTF-16LE -t UTF-8"),
    (rb"(?s)(?:\0[^\0]){8}", "UTF-16 text", "convert it with iconv -f UTF-16BE -t UTF-8"),
)
"""What a file that is no UTF-8 text begins with, its name, and what to do."""


def do_nothing() -> None:
    """The default of `stop`."""


class Piece(NamedTuple):
    """Part of a document; `last` where the document ends with it."""

    text: str
    last: bool


@dataclass(frozen=True)
class Text:
    """A text that was read once from end to end, and found to be UTF-8 with something in it."""

    name: str
    path: Path
    separator: str | None
    size: int  # bytes, byte order mark included
    characters: int  # byte order mark excluded
    sha256: str
    notes: tuple[str, ...]  # what the user should hear
    spool: tempfile.TemporaryDirectory[str] | None = None  # the copy of a pipe: it goes when the Text does

    def pieces(self, stop: Callable[[], None] = do_nothing) -> Iterator[Piece]:
        """Every document in pieces; an empty document is none. `stop` is called often and may raise.

        Raises DataError where the file is no longer the one that was opened.
        """
        digest = hashlib.sha256()
        yield from cut_pieces(_read_characters(self.name, self.path, digest.update, stop), self.separator)
        if digest.hexdigest() != self.sha256:
            raise DataError(f"{self.name} - it changed while it was read - leave it alone until the run has begun")

    def sample(self, limit: int = 50_000_000, stop: Callable[[], None] = do_nothing) -> Iterator[str]:
        """About `limit` bytes of the text, in pieces spread evenly over it: what a tokenizer is trained on."""
        every = -(-self.size // limit)
        return (piece.text for i, piece in enumerate(self.pieces(stop)) if i % every == 0)


def open_text(
    name: str, cache_dir: Path, separator: str | None = None, *, stop: Callable[[], None] = do_nothing
) -> Text:
    """Read the file `name` once and check it; '-' (standard input) and pipes are copied into `cache_dir` first.

    Raises DataError where it is absent, empty or no UTF-8 text, ResourceError where it cannot be copied.
    """
    shown = name.encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8
    spool = _spool_pipe(name, shown, cache_dir, stop)
    path = Path(spool.name, "input.txt") if spool else Path(name)
    shown = "standard input" if name == "-" else shown
    digest, size, characters, blank, ends, head, tail = hashlib.sha256(), 0, 0, True, 0, b"", ""

    def count(block: bytes) -> None:
        nonlocal size, head
        head = head or block[:3]
        size += len(block)
        digest.update(block)

    for block in _read_characters(shown, path, count, stop):
        characters += len(block)
        blank = blank and block.isspace()
        ends += (tail + block).count(END_OF_TEXT)
        tail = block[1 - len(END_OF_TEXT) :]
    if blank:
        what = "it holds only white space" if characters else "it is empty"
        raise DataError(f"{shown} - {what} - name a text file with --input_file")
    notes = []
    if head == codecs.BOM_UTF8:
        notes.append(f"{shown}: its byte order mark was left out")
    if ends and separator is None:
        notes.append(
            f"{shown}: it holds {END_OF_TEXT} {ends} times, read as plain text; "
            f"set data.document_separator to '{END_OF_TEXT}' if it ends documents"
        )
    return Text(shown, path, separator, size, characters, digest.hexdigest(), tuple(notes), spool)


def cut_pieces(blocks: Iterator[str], separator: str | None) -> Iterator[Piece]:
    """Cut a stream of characters into documents and these into pieces, by the rule above.

    Every decision looks at the same `need` characters (or at all that are left), so block sizes do not matter.
    """
    need = LONGEST_PIECE + 1 + len(separator or "")
    buffer, start, more = "", 0, True
    while True:
        while more and len(buffer) - start < need:
            block = next(blocks, None)
            more, buffer, start = block is not None, buffer[start:] + (block or ""), 0
        if start == len(buffer):
            return
        found = buffer.find(separator, start, start + need - 1) if separator else -1
        end = found if found >= 0 else len(buffer)
        cut = CUT.search(buffer, start + PIECE, min(end, start + LONGEST_PIECE + 1))
        if cut is not None:
            yield Piece(buffer[start : cut.end()], last=False)
            start = cut.end()
        elif end - start > LONGEST_PIECE:
            yield Piece(buffer[start : start + LONGEST_PIECE], last=False)
            start += LONGEST_PIECE
        else:
            if end > start:
                yield Piece(buffer[start:end], last=True)
            start = end + (len(separator or "") if found >= 0 else 0)


def _read_characters(name: str, path: Path, see: Callable[[bytes], object], stop: Callable[[], None]) -> Iterator[str]:
    """The characters of a UTF-8 file, without a byte order mark; `see` is shown its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, begun, binary, block = 0, 1, False, False, b"-"
    try:
        with path.open("rb") as file:
            while block:
                stop()
                block = file.read(BLOCK)
                see(block)
                if offset == 0:
                    _refuse_foreign_kind(name, block)
                    binary = b"\0" in block
                held = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
                offset, line = offset + len(block), line + text.count("\n")
                if text and not begun:
                    begun, text = True, text.removeprefix("\ufeff")
                if text:
                    yield text
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        what = f"byte {offset - held + error.start} is 0x{error.object[error.start]:02x}, which is not UTF-8"
        advice = (
            "it looks like a binary file; name a text file" if binary else "save it as UTF-8, or convert it with iconv"
        )
        raise DataError(f"{name}:{line} - {what} - {advice}") from None
    except OSError as error:
        raise DataError(f"{name} - it cannot be read: {error.strerror} - check the path and its permissions") from None


def _refuse_foreign_kind(name: str, head: bytes) -> None:
    for pattern, kind, advice in KINDS:
        if re.match(pattern, head):
            raise DataError(f"{name} - it is {kind}, not UTF-8 text - {advice}")


def _spool_pipe(
    name: str, shown: str, cache_dir: Path, stop: Callable[[], None]
) -> tempfile.TemporaryDirectory[str] | None:
    """Copy standard input or a pipe, which can be read only once, into a file; None for a regular file."""
    if name == "-":
        return _copy_to_spool(sys.stdin.buffer, cache_dir, stop)
    try:
        mode = Path(name).stat().st_mode
        if stat.S_ISFIFO(mode):
            with Path(name).open("rb") as pipe:
                return _copy_to_spool(pipe, cache_dir, stop)
    except FileNotFoundError:
        raise DataError(f"{shown} - there is no such file - name a text file with --input_file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown} - it cannot be read: {reason} - name a text file with --input_file") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a socket"
        raise DataError(f"{shown} - it is {kind}, not a text file - name a text file with --input_file")
    return None


def _copy_to_spool(source: IO[bytes], cache_dir: Path, stop: Callable[[], None]) -> tempfile.TemporaryDirectory[str]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        spool = tempfile.TemporaryDirectory(dir=cache_dir, prefix=".spool-", ignore_cleanup_errors=True)
        with Path(spool.name, "input.txt").open("wb") as copy:
            while block := source.read(BLOCK):
                stop()
                copy.write(block)
    except OSError as error:
        advice = "free space, or set data.cache_dir to a folder that can be written"
        raise ResourceError(f"{cache_dir} - the input cannot be copied there: {error.strerror} - {advice}") from None
    return spool
