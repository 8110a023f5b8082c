"""Documents from any input: a file, a folder, a pattern, a data set of the Hugging Face hub, or standard input.

`open_input` reads every document once: it checks them, counts them and hashes their text. What it returns has the
interface of `Text`, so that the tokenizer and the token store do not know where a document comes from. The hash covers
the text of the documents in order, not the files, so the same text in another format uses the same token cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smollm2.config.data_section import DataConfig
from smollm2.config.hub import DATA_SET, fetch_from_hub
from smollm2.data.compressed import INSTALL, open_bytes
from smollm2.data.conversations import Conversation, is_conversation, read_conversation, to_json
from smollm2.data.documents import Chunk, Documents, Source, do_nothing
from smollm2.data.text import (
    END_OF_TEXT,
    READ_ERRORS,
    expand_home,
    open_text,
    read_characters,
    split_documents,
    unreadable,
)
from smollm2.errors import ConfigError, DataError, lay_out
from smollm2.storage.input_files import (
    CHOOSE_INPUT,
    COMPRESSIONS,
    InputFiles,
    check_regular,
    find_files,
    is_hub_name,
    is_pattern,
    kind_of,
)

TEXT_FIELDS = ("text", "content", "body", "article", "document", "markdown", "code", "story")
"""The fields in which the text of a row is looked for, in this order."""

LISTED_LINES = 5
"""How many of the skipped lines are named."""

DAMAGED = "check that it is complete, and its permissions"


@dataclass(frozen=True)
class Rules:
    """How documents are read from files; from the section `data` of a config."""

    separator: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str | None = None
    skips_bad_lines: bool = False


def rules_of(data: DataConfig) -> Rules:
    """Return the rules in a config's section `data`."""
    skips = data.on_bad_line == "skip"
    return Rules(data.document_separator, data.include, data.exclude, data.text_field, skips)


@dataclass
class Counts:
    """What a pass over the documents has found."""

    characters: int = 0
    blank_documents: int = 0
    blank_characters: int = 0
    ends_of_text: int = 0
    conversations: int = 0
    bad_lines: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)  # the field of each file whose field was guessed
    digest: Any = field(default_factory=hashlib.sha256)
    documents: Documents = field(default_factory=Documents)

    def count_blank(self, characters: int) -> None:
        """Count a document that is dropped because it is empty or holds only white space."""
        self.blank_documents += 1
        self.blank_characters += characters

    def count(self, chunk: Chunk) -> None:
        """Count a chunk and add it to the hash, with a mark at the end of its document."""
        data = chunk.text.encode()
        self.characters += len(chunk.text)
        self.documents.add(chunk, data)
        self.ends_of_text += chunk.text.count(END_OF_TEXT)
        self.digest.update(data + b"\xff" * chunk.last)  # no UTF-8 text holds this byte


@dataclass(frozen=True, kw_only=True)
class Collection(Source):
    """The documents of several files, or of one that is not plain text. `size` counts their text alone."""

    files: tuple[Path, ...]
    rules: Rules

    def chunks(self, stop: Callable[[], None] = do_nothing) -> Iterator[Chunk]:
        """Yield the documents of the files in chunks."""
        counts = Counts()
        yield from read_collection(self.files, self.rules, counts, stop)
        if counts.digest.hexdigest() != self.sha256:
            raise DataError(
                self.name, "a file changed while it was being read", "start again when no program is writing there"
            )


def open_input(
    name: str,
    cache_dir: Path,
    rules: Rules,
    *,
    stop: Callable[[], None] = do_nothing,
    report: Callable[[str], None] = lambda message: None,
) -> Source:
    """Find and check the documents that `name` stands for; `report` receives a line before a download is tried.

    Raise DataError if there are none or they cannot be read, ConfigError if a package that reads them is missing, and
    ResourceError if standard input cannot be copied into `cache_dir`.
    """
    path = expand_home(name)
    is_plain = path.suffix.lower() not in COMPRESSIONS and kind_of(path) in ("text", None)
    if name != "-" and (is_pattern(str(path)) or path.is_dir()):
        found = find_files(str(path), rules.include, rules.exclude)
    elif name != "-" and not path.exists() and is_hub_name(name):
        found = find_files(str(fetch_from_hub(name, DATA_SET, report)), rules.include, rules.exclude)
    elif name == "-" or is_plain or not path.exists():
        return open_text(name, cache_dir, rules.separator, stop=stop)
    else:
        check_regular(path)
        found = InputFiles([path])
    return open_collection(name, found, rules, stop)


def open_collection(name: str, found: InputFiles, rules: Rules, stop: Callable[[], None] = do_nothing) -> Collection:
    """Read all documents of the files once. Raise DataError if there are none, or for the first one that is invalid."""
    counts, files = Counts(), tuple(found.files)
    for _ in read_collection(files, rules, counts, stop):
        pass
    if not counts.documents:
        what = "the documents contain only white space" if counts.blank_documents else "there are no documents"
        raise DataError(name, what, CHOOSE_INPUT)
    if counts.conversations and counts.conversations < len(counts.documents):
        raise DataError(
            name, "some files hold conversations and others plain text", "choose one kind with data.include"
        )
    return Collection(
        name=name,
        separator=rules.separator,
        size=counts.documents.bytes,
        characters=counts.characters,
        blank_documents=counts.blank_documents,
        blank_characters=counts.blank_characters,
        sha256=counts.digest.hexdigest(),
        notes=tuple(list_notes(name, found, rules, counts)),
        documents=counts.documents,
        is_chat=counts.conversations > 0,
        files=files,
        rules=rules,
    )


def list_notes(name: str, found: InputFiles, rules: Rules, counts: Counts) -> Iterator[str]:
    """Yield what to report about a collection: what was read, what was left out, and which decisions were made."""
    files = "1 file" if len(found.files) == 1 else f"{len(found.files):,} files"
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in found.left_out.most_common(6))
    count = len(counts.documents)
    documents = "1 document" if count == 1 else f"{count:,} documents"
    yield f"{name}: read {documents} from {files}{f'; files left out: {left_out}' if left_out else ''}"
    if counts.conversations:
        yield f"{name}: each row is a conversation; data.text_field reads a field as plain text instead"
    for text_field in sorted(set(counts.fields.values())):
        yield f"{name}: the text is the field {text_field!r}; another one is read with data.text_field"
    if counts.bad_lines:
        more = len(counts.bad_lines) - LISTED_LINES
        listed = "; ".join(counts.bad_lines[:LISTED_LINES]) + (f"; and {more:,} more" if more > 0 else "")
        yield f"{name}: skipped {len(counts.bad_lines):,} lines: {listed}"
    if counts.ends_of_text and rules.separator != END_OF_TEXT:
        yield lay_out(name, f"{END_OF_TEXT} is read as plain text ({counts.ends_of_text:,} found)", "")


def read_collection(files: tuple[Path, ...], rules: Rules, counts: Counts, stop: Callable[[], None]) -> Iterator[Chunk]:
    """Yield the documents of the files in chunks, and count them."""
    for path in files:
        kind = kind_of(path)
        chunks: Iterator[Chunk]
        if kind in ("rows", "table"):
            rows = read_rows(path, rules, counts, stop) if kind == "rows" else read_table(path, rules, counts, stop)
            chunks = (chunk for row in rows for chunk in split_row(row, counts))
        else:
            blocks = read_characters(str(path), path, lambda block: None, stop, open_bytes)
            chunks = split_documents(blocks, rules.separator, counts.count_blank)
        for chunk in chunks:
            counts.count(chunk)
            yield chunk


def split_row(row: str | Conversation, counts: Counts) -> Iterator[Chunk]:
    """Yield a document that is held in memory, in chunks; a conversation is one chunk."""
    if not isinstance(row, str):
        counts.conversations += 1
        return iter([Chunk(to_json(row), last=True)])
    if text := row:
        return split_documents(iter([text]), None, counts.count_blank)
    counts.count_blank(0)
    return iter(())


def read_rows(path: Path, rules: Rules, counts: Counts, stop: Callable[[], None]) -> Iterator[str | Conversation]:
    """Yield the text or the conversation of each line of a JSONL file; blank lines are ignored.

    Raise DataError for a line that is not a JSON object with text in its field, unless such lines are skipped.
    """
    text_field, is_chat = rules.text_field, False
    for number, line in enumerate(read_lines(path, stop), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_row(line)
            is_chat = is_chat or (text_field is None and is_conversation(row))
            if is_chat:
                yield read_conversation(row)
                continue
            if text_field is None:
                text_field = guess_field(path, {key for key, value in row.items() if isinstance(value, str)})
                counts.fields[str(path)] = text_field
            yield take_text(row, text_field)
        except ValueError as error:
            if not rules.skips_bad_lines:
                advice = "mend the line, or set data.on_bad_line to skip"
                raise DataError(where, str(error), advice) from None
            counts.bad_lines.append(f"{where} {error}")


def parse_row(line: bytes) -> dict[str, Any]:
    """Return the JSON object on a line. Raise ValueError with the reason if there is none."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("the line is not valid JSON") from None
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    return row


def take_text(row: dict[str, Any], text_field: str) -> str:
    """Return the text of a row. Raise ValueError with the reason if the field is absent or not text."""
    if text_field not in row:
        present = ", ".join(map(repr, list(row)[:8]))
        raise ValueError(f"the field {text_field!r} is absent (present: {present})")
    text = row[text_field]
    if not isinstance(text, str):
        raise ValueError(f"the field {text_field!r} is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character") from None
    return text


def guess_field(path: Path, fields: set[str]) -> str:
    """Return the field that holds the text. Raise DataError if none of the usual ones is there."""
    for text_field in TEXT_FIELDS:
        if text_field in fields:
            return text_field
    present = ", ".join(sorted(fields)[:12]) or "none"
    what = f"none of the usual fields of a document is there (fields with text: {present})"
    raise DataError(path, what, "name the field with data.text_field")


def read_lines(path: Path, stop: Callable[[], None]) -> Iterator[bytes]:
    """Yield the lines of a file that may be compressed. Raise DataError if it cannot be read."""
    try:
        with open_bytes(path) as file:
            for line in file:
                stop()
                yield line
    except READ_ERRORS as error:
        raise unreadable(path, error, DAMAGED) from None


def read_table(path: Path, rules: Rules, counts: Counts, stop: Callable[[], None]) -> Iterator[str | Conversation]:
    """Yield the text or the conversation of each row of a parquet file; rows without a value count as blank documents.

    Raise DataError if the file is damaged or its field is absent or not text.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ConfigError(path, "parquet files are read with pyarrow, which is not installed", INSTALL) from None
    try:
        with parquet.ParquetFile(path) as file:
            types = {column.name: column.type for column in file.schema_arrow}
            if rules.text_field is None and is_chat_table(types):
                yield from read_chat_table(path, file, rules, counts, stop)
                return
            texts = {
                name for name, kind in types.items() if arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
            }
            text_field = rules.text_field or guess_field(path, texts)
            if rules.text_field is None:
                counts.fields[str(path)] = text_field
            if text_field not in texts:
                what = f"is not text but {types[text_field]}" if text_field in types else "is absent"
                present = f"fields with text: {', '.join(sorted(texts)[:12]) or 'none'}"
                raise DataError(
                    path, f"the field {text_field!r} {what} ({present})", "name another one in data.text_field"
                )
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                stop()
                yield from (value or "" for value in batch.column(0).to_pylist())
    except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
        raise unreadable(path, error, DAMAGED) from None


def is_chat_table(types: dict[str, Any]) -> bool:
    """Return whether the columns of a parquet file are those of conversations."""
    return is_conversation(
        {name: [] if str(kind).startswith(("list", "large_list")) else "" for name, kind in types.items()}
    )


def read_chat_table(
    path: Path, file: Any, rules: Rules, counts: Counts, stop: Callable[[], None]
) -> Iterator[Conversation]:
    """Yield the conversation of each row of an open parquet file."""
    number = 0
    for batch in file.iter_batches(batch_size=256):
        stop()
        for row in batch.to_pylist():
            number += 1
            try:
                yield read_conversation(row)
            except ValueError as error:
                if not rules.skips_bad_lines:
                    advice = "mend the row, or set data.on_bad_line to skip"
                    raise DataError(f"{path}, row {number}", str(error), advice) from None
                counts.bad_lines.append(f"{path}, row {number} {error}")
