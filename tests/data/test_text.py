"""A text file: each kind has a written outcome, and its pieces are the text."""

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

from smollm2.data.text import CUT, LONGEST_PIECE, PIECE, Piece, Text, cut_pieces, open_text
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
    for piece in text.pieces():
        parts.append(piece.text)
        if piece.last:
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
def test_a_text_is_read_as_it_stands(content: bytes, text: str, tmp_path: Path) -> None:
    opened = open_text(write(tmp_path, content), tmp_path)
    assert join(opened) == [text]
    assert (opened.size, opened.characters) == (len(content), len(text))


REFUSED = [
    (b"", "it is empty"),
    (b"\xef\xbb\xbf", "it is empty"),
    (b" \n\t \r\n", "it holds only white space"),
    (b"one\ntwo\n\xe9t\xe9\n", ":3 - byte 8 is 0xe9, which is not UTF-8 - save it as UTF-8, or convert it with iconv"),
    (b"\xef\xbb\xbfab\n\xff", ":2 - byte 6 is 0xff, which is not UTF-8"),
    (b"cut off \xf0\x9f", ":1 - byte 8 is 0xf0, which is not UTF-8"),
    (b"a surrogate \xed\xa0\x80", ":1 - byte 12 is 0xed"),
    (b"\x7fELF\0\0\xff\xfe", "it looks like a binary file"),
    (UTF16.encode("utf-16"), "it is UTF-16 text"),
    (UTF16.encode("utf-16-le"), "it is UTF-16 text"),
    (UTF16.encode("utf-16-be"), "it is UTF-16 text"),
    (b"\xff\xfe\0\0" + UTF16.encode("utf-32-le"), "it is UTF-32 text"),
    (gzip.compress(b"text", mtime=0), "it is a gzip file, not UTF-8 text - unpack it with gunzip"),
    (b"PK\x03\x04rest", "it is a zip file"),
    (b"%PDF-1.7\nplain", "it is a PDF file"),
    (b"\x28\xb5\x2f\xfdrest", "it is a zstd file"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_what_is_no_text_is_named_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    name = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        open_text(name, tmp_path)
    assert str(caught.value).startswith(name) and message in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_that_is_not_utf8_is_found_behind_the_first_block(tmp_path: Path) -> None:
    content = ("\u00e9\n" * 700_000).encode() + b"ok \xc3("
    with pytest.raises(DataError, match=r":700001 - byte 2100003 is 0xc3"):
        open_text(write(tmp_path, content), tmp_path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.txt - there is no such file"):
        open_text(str(tmp_path / "absent.txt"), tmp_path)
    with pytest.raises(DataError, match="it is a folder"):
        open_text(str(tmp_path), tmp_path)
    with pytest.raises(DataError, match="it cannot be read"):
        open_text("a\0b", tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
def test_devices_and_symlink_loops_are_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="it cannot be read: Too many levels"):
        open_text(str(loop), tmp_path)
    with pytest.raises(DataError, match="it is a device"):
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
        "text = open_text('-', Path(sys.argv[1])); print(text.name, [p.text for p in text.pieces()])"
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


def test_a_byte_order_mark_is_said(tmp_path: Path) -> None:
    (note,) = open_text(write(tmp_path, "\ufeffText".encode()), tmp_path).notes
    assert note.endswith("its byte order mark was left out")


def test_end_of_text_lines_are_said_where_no_separator_is_set(tmp_path: Path) -> None:
    content = ("x" * (2**20 - 5) + "<|endoftext|>\ny\n<|endoftext|>").encode()  # the first one lies across two blocks
    (note,) = open_text(write(tmp_path, content), tmp_path).notes
    assert "holds <|endoftext|> 2 times" in note and "data.document_separator" in note
    assert open_text(write(tmp_path, content), tmp_path, "<|endoftext|>").notes == ()


@pytest.mark.parametrize("separator", ["\f", "<|endoftext|>", "\n\n"])
def test_documents_stand_between_separators_and_an_empty_one_is_none(separator: str, tmp_path: Path) -> None:
    content = separator.join(["", "one", "", "two\r", " three ", ""])
    assert join(open_text(write(tmp_path, content.encode()), tmp_path, separator)) == ["one", "two\r", " three "]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path, b"first text")
    text = open_text(name, tmp_path)
    write(tmp_path, b"other text")
    with pytest.raises(DataError, match="it changed while it was read"):
        list(text.pieces())


def test_stop_is_called_before_each_block(tmp_path: Path) -> None:
    name, calls = write(tmp_path, b"x" * (3 * 2**20)), []
    text = open_text(name, tmp_path, stop=lambda: calls.append(0))
    assert len(calls) == 4

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(text.pieces(stop))


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
        ids = [i for piece in text.pieces() for i in tokenizer.encode(piece.text)]
        assert tokenizer.decode_bytes(ids) == content.removeprefix(b"\xef\xbb\xbf")


def make_long_text(seed: int) -> str:
    """Words, long runs without a space, and separators, over several pieces."""
    r = random.Random(seed)
    parts = [
        "word " * r.randrange(1, 40_000),
        "x" * r.randrange(1, 3 * LONGEST_PIECE),
        "line\n\n" * 20_000,
        "\f",
        "\f\f",
    ]
    return "".join(r.choice(parts) for _ in range(8))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_do_not_depend_on_the_size_of_the_blocks(seed: int) -> None:
    text, r = make_long_text(seed), random.Random(seed)
    whole = list(cut_pieces(iter([text]), "\f"))
    assert whole == list(cut_pieces(chop(text, itertools.repeat(1001)), "\f"))
    assert whole == list(cut_pieces(chop(text, iter(lambda: r.randrange(1, 400_000), 0)), "\f"))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_the_text_and_none_is_too_long(seed: int) -> None:
    text = make_long_text(seed)
    pieces = list(cut_pieces(iter([text]), "\f"))
    assert "".join(piece.text for piece in pieces) == text.replace("\f", "")
    assert all(0 < len(piece.text) <= LONGEST_PIECE for piece in pieces)
    assert all(len(piece.text) >= PIECE for piece in pieces if not piece.last)
    assert sum(piece.last for piece in pieces) == len([document for document in text.split("\f") if document])


def test_one_huge_line_is_cut_at_the_longest_piece() -> None:
    pieces = list(cut_pieces(iter(["x" * (2 * LONGEST_PIECE + 1)]), None))
    assert [len(piece.text) for piece in pieces] == [LONGEST_PIECE, LONGEST_PIECE, 1]


def test_a_separator_of_several_characters_is_found_across_blocks_and_at_the_longest_piece() -> None:
    for length in range(LONGEST_PIECE - 3, LONGEST_PIECE + 4):
        text = "x" * length + "<|end|>" + "y"
        pieces = list(cut_pieces(chop(text, itertools.repeat(4093)), "<|end|>"))
        assert "".join(piece.text for piece in pieces) == "x" * length + "y"
        assert pieces[-1] == Piece("y", last=True) and sum(piece.last for piece in pieces) == 2


TRICKY = st.text(st.sampled_from("ab1'\u00e9\u6f22\u00b2.  \n\t\r_\u00a0\u3000\x1c\x85s"), max_size=40)


@settings(max_examples=400, deadline=None)
@given(TRICKY)
def test_a_cut_never_changes_the_tokens(text: str) -> None:
    for tokenizer in TOKENIZERS:
        for cut in CUT.finditer(text):
            left, right = text[: cut.end()], text[cut.end() :]
            assert tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(text), (left, right)


def test_the_pieces_of_shakespeare_give_the_tokens_of_the_whole(
    shakespeare: Path, smollm2_tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizer_from_text((smollm2_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = open_text(str(shakespeare), tmp_path)
    pieces = [piece.text for piece in text.pieces()]
    assert len(pieces) == 18
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode("".join(pieces))


@pytest.fixture(scope="module", autouse=True)
def _make_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("text")


FOLDER = Path()
TOKENIZERS = [
    train_tokenizer(["a b ab a b\n\na  b1 a's .  . \r\n_a  _ \u6f22\u6f22 \u3000\u3000a\n" * 9], 400),
    tokenizer_from_text("bytes"),
]
