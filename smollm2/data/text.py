"""A text file, checked once and then streamed in chunks, in bounded memory; the chunks do not depend on the read size.

`open_text` reads the file once to check that it is UTF-8, to hash it and to count its documents. `Text.chunks` reads it
again and fails if it changed. A document is cut into chunks of at least 64 Ki characters, after a newline or before a
single space between two characters that are not white space: there a ByteLevel tokenizer, with or without Digits, gives
the same tokens with and without the cut. If 128 Ki characters contain no such place, the cut is made after them and may
change the tokens around it.
"""

import codecs
import hashlib
import re
import shlex
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from smollm2.data.documents import Chunk, Documents, Source, do_nothing
from smollm2.errors import DataError, ResourceError, lay_out

CHUNK_RULE = 1
"""Incremented when the chunks of a text change, and with them possibly its tokens."""

CHUNK = 2**16
LONGEST_CHUNK = 2**17
CUT = re.compile(r"(?<=\S)\n(?=\S)|(?<=\S)(?= \S)")

BLOCK = 2**20
END_OF_TEXT = "<|endoftext|>"

CHOOSE_FILE = "choose a text file with --input_file"

BINARY_KINDS = (
    (rb"\x1f\x8b", "a gzip file", "unpack it with gunzip"),
    (rb"PK\x03\x04", "a zip file (or .docx, .epub, .pt)", "unpack it or convert it to plain text"),
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
"""The first bytes of files that are not UTF-8 text, the name of each kind, and what to do about it."""


READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file raises that is absent, forbidden, or compressed and damaged."""


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """A text file. `size` includes a byte order mark, and `characters` does not."""

    path: Path
    spool: tempfile.TemporaryDirectory[str] | None = None  # the copy of a pipe, removed together with the Text

    def chunks(self, stop: Callable[[], None] = do_nothing) -> Iterator[Chunk]:
        """Yield the documents of the file in chunks."""
        digest = hashlib.sha256()
        yield from split_documents(read_characters(self.name, self.path, digest.update, stop), self.separator)
        if digest.hexdigest() != self.sha256:
            raise DataError(
                self.name, "the file changed while it was being read", "start again when no program is writing to it"
            )


def open_text(
    name: str, cache_dir: Path, separator: str | None = None, *, stop: Callable[[], None] = do_nothing
) -> Text:
    """Read the file `name` once and check it; `-` (standard input) and pipes are copied into `cache_dir` first.

    Raise DataError if it is absent, empty or not UTF-8 text, ResourceError if it cannot be copied.
    """
    shown = name.encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8
    spool = _spool_pipe(name, shown, cache_dir, stop)
    path = Path(spool.name, "input.txt") if spool else expand_home(name)
    shown = "standard input" if name == "-" else shown
    scan, documents = _Scan(separator), Documents()
    blocks = scan.count(read_characters(shown, path, scan.count_bytes, stop))
    for chunk in split_documents(blocks, separator, scan.count_blank):
        documents.add(chunk, chunk.text.encode())
    if not documents:
        content = "separators and white space" if separator and scan.found[separator] else "white space"
        what = f"the file contains only {content}" if scan.characters else "the file is empty"
        raise DataError(shown, what, CHOOSE_FILE)
    return Text(
        name=shown,
        path=path,
        separator=separator,
        size=scan.size,
        characters=scan.characters,
        blank_documents=scan.blank_documents,
        blank_characters=scan.blank_characters,
        sha256=scan.digest.hexdigest(),
        notes=tuple(scan.list_notes(shown)),
        documents=documents,
        spool=spool,
    )


class _Scan:
    """The counts of the first pass over a file."""

    def __init__(self, separator: str | None) -> None:
        self.separator = separator
        self.digest, self.head = hashlib.sha256(), b""
        self.size = self.characters = self.blank_documents = self.blank_characters = 0
        self.found = dict.fromkeys([separator, *_list_spellings(separator)] if separator else [END_OF_TEXT], 0)

    def count_bytes(self, block: bytes) -> None:
        self.head = self.head or block[:3]
        self.size += len(block)
        self.digest.update(block)

    def count(self, blocks: Iterator[str]) -> Iterator[str]:
        """Pass the blocks on and count characters and separators, including separators that span two blocks."""
        tail, longest = "", max(map(len, self.found))
        for block in blocks:
            self.characters += len(block)
            for marker in self.found:
                self.found[marker] += (tail[max(0, len(tail) + 1 - len(marker)) :] + block).count(marker)
            tail = (tail + block)[max(0, len(tail) + len(block) + 1 - longest) :]
            yield block

    def count_blank(self, characters: int) -> None:
        self.blank_documents, self.blank_characters = self.blank_documents + 1, self.blank_characters + characters

    def list_notes(self, name: str) -> Iterator[str]:
        if self.head == codecs.BOM_UTF8:
            yield f"{name}: removed the byte order mark"
        if self.separator is None:
            if count := self.found[END_OF_TEXT]:
                what, advice = (
                    f"{END_OF_TEXT} is read as plain text ({count:,} found)",
                    "if it separates documents, set",
                )
                yield lay_out(name, what, f"{advice} data.document_separator to '{END_OF_TEXT}'")
        elif not self.found[self.separator]:
            problem = (
                f"data.document_separator: {self.separator!r} does not occur in {name}, which is read as one document."
            )
            other = next((marker for marker, count in self.found.items() if count), None)
            yield f"{problem} {other!r} does: use that." if other else problem


def _list_spellings(separator: str) -> list[str]:
    """Return what a separator that does not occur may have meant: backslash escapes, or the other line ending."""
    plain = separator
    for escape, character in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t"), (r"\f", "\f")):
        plain = plain.replace(escape, character)
    unix = plain.replace("\r\n", "\n")
    return [plain, unix, unix.replace("\n", "\r\n")]


def expand_home(name: str | Path) -> Path:
    """Return the path with `~` and `~user` expanded as in a shell; if there is no such user, it is left unchanged."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def split_documents(
    blocks: Iterator[str], separator: str | None, report_blank: Callable[[int], object] = lambda characters: None
) -> Iterator[Chunk]:
    """Split a stream of characters into documents, and these into chunks; blank documents are dropped.

    A document is blank if it is empty or holds only white space; `report_blank` is called with its length. The empty
    text before a separator at the start, or after one at the end, is not a document.
    """
    held: list[bytes] = []  # the white space at the start of a document; compressed, because it may be long
    length, begun = 0, False
    for chunk in _cut_chunks(blocks, separator):
        if not begun and not chunk.text.strip():
            held.append(zlib.compress(chunk.text.encode()))
            length += len(chunk.text)
            if chunk.last:
                report_blank(length)
                held, length = [], 0
            continue
        yield from (Chunk(zlib.decompress(data).decode(), last=False) for data in held)
        yield chunk
        held, length, begun = [], 0, not chunk.last


def _cut_chunks(blocks: Iterator[str], separator: str | None) -> Iterator[Chunk]:
    """Cut a stream of characters into chunks of documents, blank ones included, by the rule at the top of this file.

    Every decision looks at the same `need` characters (or all that are left), so block sizes do not matter.
    """
    need = LONGEST_CHUNK + 1 + len(separator or "")
    buffer, start, more, first = "", 0, True, True
    while True:
        while more and len(buffer) - start < need:
            block = next(blocks, None)
            more, buffer, start = block is not None, buffer[start:] + (block or ""), 0
        if start == len(buffer):
            return
        found = buffer.find(separator, start, start + need - 1) if separator else -1
        end = found if found >= 0 else len(buffer)
        cut = CUT.search(buffer, start + CHUNK, min(end, start + LONGEST_CHUNK + 1))
        if cut is not None:
            yield Chunk(buffer[start : cut.end()], last=False)
            start = cut.end()
        elif end - start > LONGEST_CHUNK:
            yield Chunk(buffer[start : start + LONGEST_CHUNK], last=False)
            start += LONGEST_CHUNK
        else:
            if end > start or not first:
                yield Chunk(buffer[start:end], last=True)
            start = end + (len(separator or "") if found >= 0 else 0)
        first = False


def open_plain(path: Path) -> IO[bytes]:
    """Open a file that is not compressed."""
    return path.open("rb")


def read_characters(
    name: str,
    path: Path,
    inspect: Callable[[bytes], object],
    stop: Callable[[], None],
    open_file: Callable[[Path], IO[bytes]] = open_plain,
) -> Iterator[str]:
    """Yield the characters of a UTF-8 file in blocks, without a byte order mark; `inspect` gets the bytes of each."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, begun, binary, block = 0, 1, False, False, b"-"
    try:
        with open_file(path) as file:
            while block:
                stop()
                block = file.read(BLOCK)
                inspect(block)
                if offset == 0:
                    _refuse_binary_kinds(name, block)
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
        what = f"byte 0x{error.object[error.start]:02x} at offset {offset - held + error.start} is not UTF-8"
        source = "" if name == "standard input" else f" {shlex.quote(name)} > utf8.txt"
        convert = f"if it is Windows-1252 text, convert it with `iconv -f WINDOWS-1252 -t UTF-8{source}`"
        advice = f"the file is probably binary: {CHOOSE_FILE}" if binary else convert
        raise DataError(f"{name}:{line}", what, advice) from None
    except READ_ERRORS as error:
        raise unreadable(name, error, "check the path and its permissions") from None


def unreadable(name: str | Path, error: Exception, advice: str) -> DataError:
    """Return the error for a file that cannot be read or is damaged."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(name, f"the file cannot be read ({reason})", advice)


def _refuse_binary_kinds(name: str, head: bytes) -> None:
    for pattern, kind, advice in BINARY_KINDS:
        if re.match(pattern, head):
            raise DataError(name, f"this is {kind}, not UTF-8 text", advice)


def _spool_pipe(
    name: str, shown: str, cache_dir: Path, stop: Callable[[], None]
) -> tempfile.TemporaryDirectory[str] | None:
    """Copy standard input or a pipe, which can be read only once, into a file; return None for a regular file."""
    if name == "-":
        return _copy_to_spool(sys.stdin.buffer, cache_dir, stop)
    path = expand_home(name)
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            with path.open("rb") as pipe:
                return _copy_to_spool(pipe, cache_dir, stop)
    except FileNotFoundError:
        raise DataError(shown, "file not found", CHOOSE_FILE) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(shown, f"the file cannot be read ({reason})", CHOOSE_FILE) from None
    if stat.S_ISDIR(mode):
        raise DataError(shown, "this is a folder, not a text file", CHOOSE_FILE)
    if not stat.S_ISREG(mode):
        raise DataError(shown, "this is a device or a socket, not a text file", CHOOSE_FILE)
    return None


def _copy_to_spool(source: IO[bytes], cache_dir: Path, stop: Callable[[], None]) -> tempfile.TemporaryDirectory[str]:
    cache_dir = expand_home(cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        spool = tempfile.TemporaryDirectory(dir=cache_dir, prefix=".spool-", ignore_cleanup_errors=True)
        with Path(spool.name, "input.txt").open("wb") as copy:
            while block := source.read(BLOCK):
                stop()
                copy.write(block)
    except OSError as error:
        advice = "free some space, or set data.cache_dir to a writable folder"
        raise ResourceError(cache_dir, f"the input cannot be copied there ({error.strerror})", advice) from None
    return spool
