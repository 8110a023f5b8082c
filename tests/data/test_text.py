"""A text file: each kind of file has a defined outcome, and the chunks are the text."""

import gzip
import io
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.data.documents import Chunk
from smollm2.data.text import CHUNK, CUT, LONGEST_CHUNK, Text, _Scan, open_text, split_documents
from smollm2.data.tokenizer import tokenizer_from_text, train_tokenizer
from smollm2.errors import DataError, ResourceError

UTF16 = "A text of some words."


def write(folder: Path, content: bytes) -> str:
    path = folder / "input.txt"
    path.write_bytes(content)
    return str(path)


def join(text: Text) -> list[str]:
    """The documents, whole."""
    documents, parts = [], []
    for chunk in text.chunks():
        parts.append(chunk.text)
        if chunk.last:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return documents


def chop(text: str, sizes: Iterator[int]) -> Iterator[str]:
    """The text in blocks of these sizes."""
    at = 0
    while at < len(text):
        size = next(sizes)
        yield text[at : at + size]
        at += size


ACCEPTED = [
    (b"a", "a"),
    (b"no newline at the end", "no newline at the end"),
    (b"one\r\ntwo\r\n", "one\r\ntwo\r\n"),
    (b"a\0b", "a\0b"),
    ("\ufeffna\u00efve".encode(), "na\u00efve"),
    ("a\ufeffb".encode(), "a\ufeffb"),
    (b"old mac\rlines\r", "old mac\rlines\r"),
    ("\u6f22\u5b57\U0001f600".encode(), "\u6f22\u5b57\U0001f600"),
    (b"<|endoftext|>", "<|endoftext|>"),
]


@pytest.mark.parametrize(("content", "text"), ACCEPTED)
def test_a_text_is_read_unchanged(content: bytes, text: str, tmp_path: Path) -> None:
    opened = open_text(write(tmp_path, content), tmp_path)
    assert join(opened) == [text]
    assert (opened.size, opened.characters) == (len(content), len(text))


REFUSED = [
    (b"", ": the file is empty. Choose a text file with --input_file."),
    (b"\xef\xbb\xbf", ": the file is empty"),
    (b" \n\t \r\n", ": the file contains only white space"),
    (b"one\ntwo\n\xe9t\xe9\n", ":3: byte 0xe9 at offset 8 is not UTF-8. If it is Windows-1252 text, convert it with"),
    (b"\xef\xbb\xbfab\n\xff", ":2: byte 0xff at offset 6 is not UTF-8"),
    (b"cut off \xf0\x9f", ":1: byte 0xf0 at offset 8 is not UTF-8"),
    (b"a surrogate \xed\xa0\x80", ":1: byte 0xed at offset 12"),
    (b"\x7fELF\0\0\xff\xfe", "The file is probably binary"),
    (UTF16.encode("utf-16"), "this is UTF-16 text"),
    (UTF16.encode("utf-16-le"), "this is UTF-16 text"),
    (UTF16.encode("utf-16-be"), "this is UTF-16 text"),
    (b"\xff\xfe\0\0" + UTF16.encode("utf-32-le"), "this is UTF-32 text"),
    (gzip.compress(b"text", mtime=0), ": this is a gzip file, not UTF-8 text. Unpack it with gunzip."),
    (b"PK\x03\x04rest", "this is a zip file"),
    (b"PAR1rest", "this is a parquet file"),
    (b"%PDF-1.7\nplain", "this is a PDF file"),
    (b"\x28\xb5\x2f\xfdrest", "this is a zstd file"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_a_file_that_is_not_text_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    name = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        open_text(name, tmp_path)
    assert str(caught.value).startswith(name) and message in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_that_is_not_utf8_is_found_after_the_first_block(tmp_path: Path) -> None:
    content = ("\u00e9\n" * 700_000).encode() + b"ok \xc3("
    with pytest.raises(DataError, match=r":700001: byte 0xc3 at offset 2100003 is not UTF-8"):
        open_text(write(tmp_path, content), tmp_path)


def test_a_missing_file_and_an_impossible_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.txt: file not found"):
        open_text(str(tmp_path / "absent.txt"), tmp_path)
    with pytest.raises(DataError, match="the file cannot be read"):
        open_text("a\0b", tmp_path)


def test_a_text_file_of_json_lines_is_text(tmp_path: Path) -> None:
    assert join(open_text(write(tmp_path, b'{"text": "one"}\n'), tmp_path)) == ['{"text": "one"}\n']


def test_the_command_that_converts_a_text_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my text.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as caught:
        open_text(str(path), tmp_path)
    command = str(caught.value).split("`")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "utf8.txt").read_text(encoding="utf-8") == "caf\u00e9"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path, b"some text")
    assert join(open_text("~/input.txt", tmp_path)) == ["some text"]


def test_a_file_name_that_begins_with_a_tilde_and_no_user_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~no-such-user.txt").write_text("some text")
    assert join(open_text("~no-such-user.txt", tmp_path)) == ["some text"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
def test_devices_and_symlink_loops_are_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"the file cannot be read \(Too many levels"):
        open_text(str(loop), tmp_path)
    with pytest.raises(DataError, match="this is a device"):
        open_text("/dev/zero", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names of any bytes")
@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"two words.txt", b"n" * 251 + b".txt", b"new\nline"])
def test_odd_file_names_work_and_can_be_printed(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_text("some text")
    text = open_text(str(path), tmp_path)
    assert join(text) == ["some text"]
    text.name.encode()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_copied_and_can_be_read_again(tmp_path: Path) -> None:
    pipe, cache = tmp_path / "pipe", tmp_path / "cache"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("from a pipe",))
    writer.start()
    text = open_text(str(pipe), cache)
    writer.join()
    assert join(text) == join(text) == ["from a pipe"]
    del text
    assert list(cache.iterdir()) == []


def test_standard_input_is_read_to_its_end(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from smollm2.data.text import open_text;"
        "text = open_text('-', Path(sys.argv[1])); print(text.name, [c.text for c in text.chunks()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input=b"typed\ntext", capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == r"standard input ['typed\ntext']"
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_needs_a_cache_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with pytest.raises(ResourceError, match=r"set data\.cache_dir"):
        open_text("-", tmp_path / "cache")


def test_a_byte_order_mark_is_removed_and_reported(tmp_path: Path) -> None:
    (note,) = open_text(write(tmp_path, "\ufeffText".encode()), tmp_path).notes
    assert note.endswith("removed the byte order mark")


def test_end_of_text_lines_are_reported_if_no_separator_is_set(tmp_path: Path) -> None:
    content = (
        "x" * (2**20 - 5) + "<|endoftext|>\ny\n<|endoftext|>"
    ).encode()  # the first one is split across two blocks
    (note,) = open_text(write(tmp_path, content), tmp_path).notes
    assert "<|endoftext|> is read as plain text (2 found)" in note and "data.document_separator" in note
    assert open_text(write(tmp_path, content), tmp_path, "<|endoftext|>").notes == ()


@pytest.mark.parametrize("separator", ["\f", "<|endoftext|>", "\n\n"])
def test_documents_are_between_separators_and_empty_ones_are_dropped(separator: str, tmp_path: Path) -> None:
    content = separator.join(["", "one", "", "two\r", " three ", ""])
    assert join(open_text(write(tmp_path, content.encode()), tmp_path, separator)) == ["one", "two\r", " three "]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path, b"first text")
    text = open_text(name, tmp_path)
    write(tmp_path, b"other text")
    with pytest.raises(DataError, match="the file changed while it was being read"):
        list(text.chunks())


def test_stop_is_called_before_each_block(tmp_path: Path) -> None:
    name, calls = write(tmp_path, b"x" * (3 * 2**20)), []
    text = open_text(name, tmp_path, stop=lambda: calls.append(0))
    assert len(calls) == 4

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(text.chunks(stop))


def test_a_sample_is_spread_over_the_text(tmp_path: Path) -> None:
    text = open_text(write(tmp_path, "".join(f"line {i}\n" for i in range(400_000)).encode()), tmp_path)
    sample = list(text.sample(1_000_000))
    assert 500_000 < sum(map(len, sample)) < 1_500_000
    assert sample[0].startswith("line 0\n") and "line 3" in sample[-1]
    assert "".join(text.sample()) == join(text)[0]


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_a_text_that_comes_back_or_one_line(content: bytes) -> None:
    path = FOLDER / "any.txt"
    path.write_bytes(content)
    problem = ""
    try:
        text = open_text(str(path), FOLDER)
    except DataError as error:
        problem = str(error)
    assert "\n" not in problem
    if not problem:
        tokenizer = tokenizer_from_text("bytes")
        ids = [i for chunk in text.chunks() for i in tokenizer.encode(chunk.text)]
        assert tokenizer.decode_bytes(ids) == content.removeprefix(b"\xef\xbb\xbf")


def make_long_text(seed: int) -> str:
    """Return words, long runs without a space, white space and separators, over several chunks."""
    r = random.Random(seed)
    parts = [
        "word " * r.randrange(1, 40_000),
        "x" * r.randrange(1, 3 * LONGEST_CHUNK),
        " \n" * r.randrange(1, LONGEST_CHUNK),
        "line\n\n" * 20_000,
        "\f",
        "\f\f",
    ]
    return "".join(r.choice(parts) for _ in range(8))


@pytest.mark.parametrize("seed", range(5))
def test_chunks_do_not_depend_on_the_size_of_the_blocks(seed: int) -> None:
    text, r = make_long_text(seed), random.Random(seed)
    whole = list(split_documents(iter([text]), "\f"))
    assert whole == list(split_documents(chop(text, itertools.repeat(1001)), "\f"))
    assert whole == list(split_documents(chop(text, iter(lambda: r.randrange(1, 400_000), 0)), "\f"))


@pytest.mark.parametrize("seed", range(5))
def test_chunks_are_the_text_without_blank_documents_and_none_is_too_long(seed: int) -> None:
    text = make_long_text(seed)
    chunks = list(split_documents(iter([text]), "\f"))
    documents = [document for document in text.split("\f") if document.strip()]
    assert "".join(chunk.text for chunk in chunks) == "".join(documents)
    assert all(0 < len(chunk.text) <= LONGEST_CHUNK for chunk in chunks)
    assert all(len(chunk.text) >= CHUNK for chunk in chunks if not chunk.last)
    assert sum(chunk.last for chunk in chunks) == len(documents)


BLANK = [
    ("one\f\ftwo", 1, 0),
    ("one\f \n\t\ftwo", 1, 3),
    ("\fone\ftwo\f", 0, 0),
    ("\f\fone\f\ftwo\f\f", 3, 0),
    (" \fone\ftwo\f\n", 2, 2),
    ("one\f" + " \n" * LONGEST_CHUNK + "\ftwo", 1, 2 * LONGEST_CHUNK),
]


@pytest.mark.parametrize(("content", "count", "characters"), BLANK)
def test_blank_documents_are_dropped_and_counted(content: str, count: int, characters: int, tmp_path: Path) -> None:
    text = open_text(write(tmp_path, content.encode()), tmp_path, "\f")
    assert join(text) == ["one", "two"]
    assert (text.blank_documents, text.blank_characters) == (count, characters)


def test_white_space_before_a_document_is_part_of_it(tmp_path: Path) -> None:
    content = "one\f" + " \n" * LONGEST_CHUNK + "two \f \f"
    text = open_text(write(tmp_path, content.encode()), tmp_path, "\f")
    assert join(text) == ["one", " \n" * LONGEST_CHUNK + "two "]


@pytest.mark.parametrize("content", [b"\f\f", b" \f\n\f "])
def test_separators_and_white_space_alone_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file contains only separators and white space"):
        open_text(write(tmp_path, content), tmp_path, "\f")


SPELLINGS = [
    ("one two", "\f", "which is read as one document."),
    ("one\r\n\r\ntwo\r\n\r\n", "\n\n", r"which is read as one document. '\r\n\r\n' does: use that."),
    ("one\n\ntwo", "\r\n\r\n", r"'\n\n' does: use that."),
    ("one\n\ntwo", r"\n\n", r"'\n\n' does: use that."),
    ("one\ftwo", r"\f", r"'\x0c' does: use that."),
    ("one\r\n--\r\ntwo", r"\n--\n", r"'\r\n--\r\n' does: use that."),
]


@pytest.mark.parametrize(("content", "separator", "end"), SPELLINGS)
def test_a_separator_that_never_occurs_is_reported_with_the_spelling_that_does(
    content: str, separator: str, end: str, tmp_path: Path
) -> None:
    text = open_text(write(tmp_path, content.encode()), tmp_path, separator)
    (note,) = text.notes
    assert note.startswith(f"data.document_separator: {separator!r} does not occur in ") and note.endswith(end)
    assert join(text) == [content]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("a\n\r-", max_size=9), max_size=9), st.sampled_from(["a", "\n\n", "--", "a-a-a"]))
def test_a_separator_is_found_whatever_blocks_it_is_split_across(blocks: list[str], separator: str) -> None:
    scan = _Scan(separator)
    assert list(scan.count(iter(blocks))) == blocks
    assert (scan.found[separator] > 0) == (separator in "".join(blocks))


def test_one_huge_line_is_cut_at_the_longest_chunk() -> None:
    chunks = list(split_documents(iter(["x" * (2 * LONGEST_CHUNK + 1)]), None))
    assert [len(chunk.text) for chunk in chunks] == [LONGEST_CHUNK, LONGEST_CHUNK, 1]


def test_a_separator_of_several_characters_is_found_across_blocks_and_at_the_longest_chunk() -> None:
    for length in range(LONGEST_CHUNK - 3, LONGEST_CHUNK + 4):
        text = "x" * length + "<|end|>" + "y"
        chunks = list(split_documents(chop(text, itertools.repeat(4093)), "<|end|>"))
        assert "".join(chunk.text for chunk in chunks) == "x" * length + "y"
        assert chunks[-1] == Chunk("y", last=True) and sum(chunk.last for chunk in chunks) == 2


TRICKY = st.text(st.sampled_from("ab1'\u00e9\u6f22\u00b2.  \n\t\r_\u00a0\u3000\x1c\x85s"), max_size=40)


@settings(max_examples=400, deadline=None)
@given(TRICKY)
def test_a_cut_never_changes_the_tokens(text: str) -> None:
    for tokenizer in TOKENIZERS:
        for cut in CUT.finditer(text):
            left, right = text[: cut.end()], text[cut.end() :]
            assert tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(text), (left, right)


def test_the_chunks_of_shakespeare_give_the_tokens_of_the_whole(
    shakespeare: Path, smollm2_tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizer_from_text((smollm2_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = open_text(str(shakespeare), tmp_path)
    chunks = [chunk.text for chunk in text.chunks()]
    assert len(chunks) == 18
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode("".join(chunks))


@pytest.fixture(scope="module", autouse=True)
def _make_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("text")


FOLDER = Path()
TOKENIZERS = [
    train_tokenizer(["a b ab a b\n\na  b1 a's .  . \r\n_a  _ \u6f22\u6f22 \u3000\u3000a\n" * 9], 400),
    tokenizer_from_text("bytes"),
]
