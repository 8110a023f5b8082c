"""Documents from files of every format, each made by the format's own library, and what is said of bad ones."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from smollm2.data.documents import Source
from smollm2.data.sources import Rules, open_input
from smollm2.errors import ConfigError, DataError

DOCUMENTS = [
    "The first document.\nIt has two lines.\n",
    "Ein zweites, mit Ümlaut: 漢字.",
    "def third():\n    return 3\n",
]


def rows(field: str = "text", **more: object) -> bytes:
    """The documents as JSONL."""
    return b"".join(json.dumps({"id": i, field: text, **more}).encode() + b"\n" for i, text in enumerate(DOCUMENTS))


def write_parquet(path: Path, field: str = "text") -> None:
    parquet.write_table(arrow.table({"id": list(range(3)), field: DOCUMENTS}), path)


def open_path(path: Path | str, **rules: object) -> Source:
    folder = Path(path).parent if isinstance(path, Path) else Path()
    return open_input(str(path), folder / "cache", Rules(**rules))  # type: ignore[arg-type]


def documents(source: Source) -> list[str]:
    """Return the documents whole."""
    found, parts = [], []
    for chunk in source.chunks():
        parts.append(chunk.text)
        if chunk.last:
            found.append("".join(parts))
            parts = []
    assert parts == []
    return found


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(rows()),
    "a.ndjson": lambda path: path.write_bytes(rows("content", text=None)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(rows())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(rows())),
    "a.parquet": write_parquet,
    "b.parquet": lambda path: write_parquet(path, "content"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_and_the_same_hash(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    (tmp_path / "reference.jsonl").write_bytes(rows())
    source, reference = open_path(tmp_path / name), open_path(tmp_path / "reference.jsonl")
    assert documents(source) == DOCUMENTS
    assert source.sha256 == reference.sha256
    assert source.size == sum(len(text.encode()) for text in DOCUMENTS)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_text_is_a_text(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{'.gz' if compress is gzip.compress else '.zst'}"
    path.write_bytes(compress(b"eins\fzwei"))
    assert documents(open_path(path, separator="\f")) == ["eins", "zwei"]


def test_a_compressed_file_of_several_parts_is_read_to_its_end(tmp_path: Path) -> None:
    """As `cat a.gz b.gz` and as parallel compressors write them."""
    first, second = rows().splitlines(keepends=True)[:1], rows().splitlines(keepends=True)[1:]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(b"".join(part)) for part in (first, second)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(b"".join(part)) for part in (first, second)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert documents(open_path(tmp_path / name)) == DOCUMENTS


def make_folder(folder: Path) -> Path:
    """A folder of notes with files of several kinds."""
    (folder / "sub").mkdir(parents=True)
    for name, text in {"b.md": "B", "a.txt": "A", "Z.txt": "Z", "sub/c.py": "C", "ä.txt": "Ä"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden")
    (folder / "rows.jsonl").write_bytes(rows())
    return folder


def test_a_folder_is_read_recursively_in_the_order_of_the_bytes_of_the_names(tmp_path: Path) -> None:
    source = open_path(make_folder(tmp_path / "notes"))
    assert documents(source) == ["Z", "A", "B", *DOCUMENTS, "C", "Ä"]
    assert f"{tmp_path / 'notes'}: read 8 documents from 6 files; files left out: 1 .png" in source.notes


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"include": ("*.md",)}, ["B"]),
        ({"include": ("sub/*", "Z.txt")}, ["Z", "C"]),
        ({"exclude": ("*.jsonl", "sub/*")}, ["Z", "A", "B", "Ä"]),
        ({"include": ("*.txt",), "exclude": ("a*",)}, ["Z", "Ä"]),
    ],
)
def test_patterns_choose_the_files_of_a_folder(rules: dict[str, object], expected: list[str], tmp_path: Path) -> None:
    assert documents(open_path(make_folder(tmp_path / "notes"), **rules)) == expected


def test_a_pattern_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    assert documents(open_path("notes/**/*.py")) == ["C"]
    assert documents(open_path("notes/[aZ].txt")) == ["Z", "A"]


def test_a_data_set_in_hub_layout_is_its_training_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    for split in ("train", "test", "validation"):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    source = open_path(folder)
    assert documents(source) == DOCUMENTS
    assert "files left out: 2 of another split, 1 data set card" in source.notes[0]


def test_a_hub_name_is_read_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "datasets--me--stories" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "train.jsonl").write_bytes(rows("story"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert documents(open_path("me/stories")) == DOCUMENTS


def test_the_field_of_the_text_is_guessed_and_reported_or_set(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(rows("content", title="A title"))
    assert "the text is the field 'content'; another one is read with data.text_field" in open_path(path).notes[1]
    assert documents(open_path(path, text_field="title")) == 3 * ["A title"]


def test_blank_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": " \\n"}\n\n{"text": "x"}\n')
    source = open_path(path)
    assert documents(source) == ["x"] and (source.blank_documents, source.blank_characters) == (2, 2)


def test_a_long_row_is_cut_into_chunks(tmp_path: Path) -> None:
    text = "word " * 100_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    chunks = list(open_path(tmp_path / "a.jsonl").chunks())
    assert len(chunks) > 3 and "".join(chunk.text for chunk in chunks) == text
    assert [chunk.last for chunk in chunks] == [*(len(chunks) - 1) * [False], True]


def test_a_file_that_changes_between_two_readings_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows())
    source = open_path(path)
    path.write_bytes(rows().replace(b"first", b"First"))
    with pytest.raises(DataError, match="a file changed while it was being read"):
        documents(source)


BAD_ROWS = {
    "not JSON": (b'{"text": "a"}\n{"text": \n', ":2: the line is not valid JSON"),
    "no object": (b'{"text": "a"}\n[1]\n', ":2: the line is not a JSON object"),
    "no field": (b'{"text": "a"}\n{"other": "b"}\n', ":2: the field 'text' is absent (present: 'other')"),
    "no text": (b'{"text": "a"}\n{"text": 3}\n', ":2: the field 'text' is not text but int"),
    "nothing": (b'{"text": "a"}\n{"text": null}\n', ":2: the field 'text' is not text but NoneType"),
    "half a character": (b'{"text": "a"}\n{"text": "\\ud800"}\n', ":2: \\ud800 is half of a surrogate pair"),
    "no UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: byte 0xff is not UTF-8"),
    "deep": (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", ":2: the line is not valid JSON"),
}


@pytest.mark.parametrize(("content", "what"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_line_is_named_or_skipped_and_listed(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content + b'{"text": "c"}\n')
    with pytest.raises(DataError) as caught:
        open_path(path)
    assert str(caught.value).startswith(f"{path}{what}") and "\n" not in str(caught.value)
    assert "data.on_bad_line to skip" in str(caught.value)
    source = open_path(path, skips_bad_lines=True)
    assert documents(source) == ["a", "c"]
    assert f"skipped 1 lines: {path}:2 " in source.notes[-1]


def write_truncated(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def write_in_folder(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)


def make_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "a.txt")


def make_loop(path: Path) -> None:
    path.mkdir()
    (path / "a").symlink_to(path)


def make_dangling(path: Path) -> None:
    path.mkdir()
    (path / "a.txt").symlink_to(path / "a.txt")


def write_numbers(path: Path) -> None:
    parquet.write_table(arrow.table({"number": [1, 2]}), path)


LARGE = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(5000))
BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a truncated gzip": ("a.jsonl.gz", lambda path: write_truncated(path, gzip.compress(LARGE)), "cannot be read"),
    "no gzip": ("a.jsonl.gz", lambda path: path.write_bytes(rows()), "cannot be read"),
    "a truncated text": (
        "a.txt.gz",
        lambda path: write_truncated(path, gzip.compress(LARGE)),
        "before the end-of-stream",
    ),
    "a text that is no gzip": ("a.txt.gz", lambda path: path.write_bytes(rows()), "Not a gzipped file"),
    "a truncated zstd text": ("a.txt.zst", lambda path: write_truncated(path, zstandard.compress(LARGE)), "truncated"),
    "a truncated zstd": (
        "a.jsonl.zst",
        lambda path: write_truncated(path, zstandard.compress(LARGE)),
        "cannot be read",
    ),
    "no zstd": ("a.jsonl.zst", lambda path: path.write_bytes(rows()), "cannot be read"),
    "a truncated parquet": ("a.parquet", lambda path: write_truncated(path, LARGE), "cannot be read"),
    "a parquet of numbers": ("a.parquet", write_numbers, "none of the usual fields of a document is there"),
    "rows without a usual field": ("a.jsonl", lambda path: path.write_text('{"x": "y"}'), "(fields with text: x)"),
    "a file without rows": ("a.jsonl", lambda path: path.touch(), "there are no documents"),
    "blank rows": ("a.jsonl", lambda path: path.write_text('{"text": " "}'), "the documents contain only white space"),
    "an empty folder": ("folder", lambda path: path.mkdir(), "no file to read there"),
    "a folder of pictures": (
        "folder",
        lambda path: write_in_folder(path / "a.png", b"\x89PNG"),
        "no file to read there (1 .png left out)",
    ),
    "a pipe in a folder": ("folder", make_pipe, "this is a pipe, not a file"),
    "a loop of folders": ("folder", make_loop, "this link leads back to a folder above it"),
    "a loop of links": ("folder", make_dangling, "cannot be read (Too many levels of symbolic links)"),
    "UTF-16 in a folder": (
        "folder",
        lambda path: write_in_folder(path / "a.txt", "hello".encode("utf-16")),
        "this is UTF-16 text",
    ),
    "no UTF-8 in a folder": (
        "folder",
        lambda path: write_in_folder(path / "a.txt", b"a\n\xe9"),
        "a.txt:2: byte 0xe9 at offset 2 is not UTF-8",
    ),
}


@pytest.mark.parametrize(("name", "make", "what"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_line_that_names_it(
    name: str, make: Callable[[Path], object], what: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        open_path(tmp_path / name)
    message = str(caught.value)
    assert what in message and message.startswith(str(tmp_path / name)) and "\n" not in message


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMATS[name](tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module}, which is not installed\. Run `pip install 'smollm2-training"):
        open_path(tmp_path / name)


def test_a_name_that_is_neither_here_nor_on_the_hub_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reports: list[str] = []
    with pytest.raises(DataError, match="no such file or folder, and the download from the hub failed"):
        open_input("me/absent", tmp_path, Rules(), report=reports.append)
    assert len(reports) == 1 and "not on this machine" in reports[0]


def test_a_name_that_no_repository_can_have_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^me/a\.\.b: there is no such file or folder, and this is not a hub name"):
        open_path("me/a..b")
