"""Tokens on disk: whole or absent, never stale, split without overlap, in bounded memory."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.data.building import prepare_tokens
from smollm2.data.shards import HEADER_SIZE
from smollm2.data.store import TokenStore, open_tokens
from smollm2.data.stream import Stream
from smollm2.data.text import open_text
from smollm2.data.tokenizer import Tokenizer, tokenizer_from_text
from smollm2.data.windows import Windows
from smollm2.errors import DataError, ResourceError

BYTES = tokenizer_from_text("bytes")
END = BYTES.end_of_text


def prepare(
    folder: Path, text: str, fraction: float = 0.0, separator: str | None = "\f", tokenizer: Tokenizer = BYTES
) -> TokenStore:
    path = folder / "input.txt"
    path.write_bytes(text.encode())
    return prepare_tokens(open_text(str(path), folder, separator), tokenizer, folder / "cache", fraction)


def split_documents(stream: Stream) -> list[str]:
    """The documents in a stream of byte tokens."""
    tokens = stream[:]
    parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)
    assert parts.pop().size == 0
    return [BYTES.decode(part[:-1].tolist()) for part in parts]


def make_documents(count: int, seed: int = 0) -> list[str]:
    r = random.Random(seed)
    return [f"{i} " + "word " * r.randrange(1, 40) for i in range(count)]


def test_every_document_ends_with_end_of_text(tmp_path: Path) -> None:
    store = prepare(tmp_path, "ab\f\u00e9\f")
    assert store.train.tolist() == [97, 98, END, 195, 169, END]
    assert len(store.validation) == 0


def test_a_text_without_a_separator_is_one_document(tmp_path: Path) -> None:
    assert prepare(tmp_path, "a\fb", separator=None).train.tolist() == [97, 12, 98, END]


def test_the_tail_of_few_documents_is_held_out(tmp_path: Path) -> None:
    store = prepare(tmp_path, "x" * 999, fraction=0.1)
    assert (len(store.train), len(store.validation)) == (900, 100)
    assert store.validation[-1:].tolist() == [END] and store.statistics.validation_tokens == 100


def test_a_tiny_text_holds_out_three_tokens_or_none(tmp_path: Path) -> None:
    assert len(prepare(tmp_path, "abcd", fraction=0.01).validation) == 3
    assert len(prepare(tmp_path, "abc", fraction=0.5).validation) == 0


def test_a_validation_text_has_a_target_that_is_not_an_end_of_text(tmp_path: Path) -> None:
    for text in ("hi there\n", "\f".join("x" * 20)):
        validation = prepare(tmp_path, text, fraction=0.05).validation
        assert BYTES.bytes_per_token[validation[1:]].sum() > 0


@pytest.mark.parametrize(("text", "fraction"), [("abc", 0.5), ("some text", 0.0)])
def test_the_statistics_line_reports_that_there_is_no_validation_text(
    text: str, fraction: float, tmp_path: Path
) -> None:
    store = prepare(tmp_path, text, fraction)
    assert "for training, none for validation;" in store.statistics.describe(Windows(store.train, 4, 4, 257))


def test_of_many_documents_whole_ones_are_held_out(tmp_path: Path) -> None:
    documents = make_documents(400)
    store = prepare(tmp_path, "\f".join(documents), fraction=0.1)
    train, validation = split_documents(store.train), split_documents(store.validation)
    assert sorted(train + validation) == sorted(documents)
    assert train == [document for document in documents if document not in validation]
    assert 0.05 <= len(store.validation) / store.statistics.tokens <= 0.15
    positions = [documents.index(document) for document in validation]
    assert min(positions) < 100 and max(positions) > 300


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=20, max_size=40), st.floats(0.001, 0.5))
def test_some_documents_are_held_out_and_never_all(lengths: list[int], fraction: float) -> None:
    store = prepare(FOLDER, "\f".join("x" * length for length in lengths), fraction)
    held_out, total = len(store.validation), store.statistics.tokens
    assert len(store.train) + held_out == total
    assert 0 < held_out <= max(1.5 * fraction * total, total / 20, 4)


def test_one_huge_document_is_not_held_out(tmp_path: Path) -> None:
    store = prepare(tmp_path, "\f".join([*make_documents(30), "x" * 100_000]), fraction=0.05)
    assert 0 < len(store.validation) < 10_000


class FakeEncoder:
    """Adds nothing to a document, and may encode it in chunks."""

    def __init__(self) -> None:
        self.begin: list[int] = []
        self.cuts_documents, self.marks_targets = True, False
        self.closing = [int(vars(type(self))["end_of_text"])]


def test_tokens_are_taken_from_the_cache(tmp_path: Path) -> None:
    prepare(tmp_path, "some text")

    class Unused(FakeEncoder):
        text, vocab_size, end_of_text, fingerprint = "bytes", BYTES.vocab_size, END, BYTES.fingerprint

        def encode_counted(self, text: str) -> tuple[list[int], int]:
            raise AssertionError("the text was tokenized again")

    text = open_text(str(tmp_path / "input.txt"), tmp_path, "\f")
    store = prepare_tokens(text, Unused(), tmp_path / "cache", 0.0)
    assert BYTES.decode(store.train[:-1].tolist()) == "some text"


def test_another_text_tokenizer_separator_or_fraction_is_another_cache(
    tmp_path: Path, smollm2_tokenizer_folder: Path
) -> None:
    other = tokenizer_from_text((smollm2_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    stores = [
        prepare(tmp_path, "some text"),
        prepare(tmp_path, "some Text"),
        prepare(tmp_path, "some text", separator="\n"),
        prepare(tmp_path, "some text", fraction=0.1),
        prepare(tmp_path, "some text", tokenizer=other),
    ]
    assert len({store.fingerprint for store in stores}) == 5


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "index cut": ("index.json", lambda data: data[:20]),
    "index empty": ("index.json", lambda data: b""),
    "index not JSON": ("index.json", lambda data: b"\xff" + data),
    "index a list": ("index.json", lambda data: b"[]"),
    "index without counts": ("index.json", lambda data: b'{"statistics": {}}'),
    "index of another format": ("index.json", lambda data: data.replace(b"tokens/1", b"tokens/9")),
    "shard cut": ("train-00000.bin", lambda data: data[:-1]),
    "shard too long": ("train-00000.bin", lambda data: data + b"\0\0"),
    "ends cut": ("train.ends", lambda data: data[:-1]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_made_again(kind: str, tmp_path: Path) -> None:
    store = prepare(tmp_path, "x" * 999, 0.1)
    whole = store.train.tolist()
    name, damage = DAMAGE[kind]
    path = store.folder / name
    path.write_bytes(damage(path.read_bytes()))
    assert open_tokens(store.folder) is None
    assert prepare(tmp_path, "x" * 999, 0.1).train.tolist() == whole


@pytest.mark.parametrize("name", ["index.json", "train-00000.bin", "train.ends", "validation.ends"])
def test_a_cache_that_lacks_a_file_is_made_again(name: str, tmp_path: Path) -> None:
    store = prepare(tmp_path, "x" * 999, 0.1)
    (store.folder / name).unlink()
    assert len(prepare(tmp_path, "x" * 999, 0.1).train) == 900


def test_a_changed_id_is_found_when_its_window_is_read(tmp_path: Path) -> None:
    store = prepare(tmp_path, "x" * 999)
    tokens = np.memmap(store.folder / "train-00000.bin", "<u2", "r+", offset=HEADER_SIZE)
    tokens[500] = 60_000
    tokens.flush()
    with pytest.raises(DataError, match=r"train-00000\.bin: token 500 has id 60000"):
        Windows(store.train, 100, 100, store.vocab_size).read(5)


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    class Large(FakeEncoder):
        text, vocab_size, end_of_text, fingerprint = "", 70_000, 69_999, "1a" * 32

        def encode_counted(self, text: str) -> tuple[list[int], int]:
            return [65_536 + ord(c) for c in text], 0

    (tmp_path / "input.txt").write_text("ab")
    text = open_text(str(tmp_path / "input.txt"), tmp_path)
    store = prepare_tokens(text, Large(), tmp_path / "cache", 0.0)
    assert store.train.dtype == np.uint32 and store.train.tolist() == [65_633, 65_634, 69_999]


def test_an_id_outside_the_vocabulary_is_never_written(tmp_path: Path) -> None:
    class Wrong(FakeEncoder):
        text, vocab_size, end_of_text, fingerprint = "", 257, 256, "1a" * 32

        def encode_counted(self, text: str) -> tuple[list[int], int]:
            return [257], 0

    (tmp_path / "input.txt").write_text("ab")
    with pytest.raises(DataError, match="an id outside its vocabulary of 257"):
        prepare_tokens(open_text(str(tmp_path / "input.txt"), tmp_path), Wrong(), tmp_path / "cache", 0.0)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("unknown", "reported"), [(0, False), (10, False), (11, True), (499, True)])
def test_an_unknown_share_over_a_thousandth_is_reported(
    unknown: int, reported: bool, tmp_path: Path, smollm2_tokenizer_folder: Path
) -> None:
    tokenizer = tokenizer_from_text((smollm2_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    store = prepare(tmp_path, "\x04" * unknown + "." * (10_000 - unknown), tokenizer=tokenizer)
    assert store.statistics.unknown_bytes == unknown
    assert bool(store.notes) == reported
    if unknown == 499:
        assert store.notes == ("the tokenizer cannot encode 4.99% of the bytes (499 in 1 of 1 documents)",)


def test_an_unknown_share_over_a_twentieth_stops(tmp_path: Path, smollm2_tokenizer_folder: Path) -> None:
    tokenizer = tokenizer_from_text((smollm2_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match=r"cannot encode 5\.01% of the bytes \(501 in 1 of 2 documents\)"):
        prepare(tmp_path, "\x04" * 501 + "." * 9_490 + "\f" + "." * 8, tokenizer=tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_blank_documents_are_not_trained_on_and_counted_in_the_statistics_line(tmp_path: Path) -> None:
    text = "some text\f \n\t\f" * 999
    store = prepare(tmp_path, text)
    assert split_documents(store.train) == ["some text"] * 999
    assert "8,991 characters in 999 documents (999 blank dropped): " in store.statistics.describe(
        Windows(store.train, 16, 16, store.vocab_size)
    )


def test_a_text_without_blank_documents_keeps_the_fingerprint_of_version_0_1_0(tmp_path: Path) -> None:
    store = prepare(tmp_path, "one\f\ftwo", 0.05)
    assert store.fingerprint == "71e4bbd09c5338a1f689ba6c402a23441f42d988f9bfd60742e0da7384d285fa"


def test_a_text_with_blank_documents_has_another_fingerprint_than_in_version_0_1_0(tmp_path: Path) -> None:
    assert (
        prepare(tmp_path, "one\f \ftwo", 0.05).fingerprint
        != "7a7d5ca262066cbfcf3c5bd0ed05bcf5a8680c85ac69b7eedc46a2575621d5e3"
    )


def test_the_statistics_line_proves_that_nothing_is_lost(tmp_path: Path) -> None:
    store = prepare(tmp_path, "abc\f" + "\u00e9" * 96 + "\f", fraction=0.1)
    windows = Windows(store.train, 16, 16, store.vocab_size)
    assert store.statistics.describe(windows) == (
        "99 characters in 2 documents: 197 tokens (0.50 characters per token; unencodable bytes: none); "
        "177 for training, 20 for validation; 11 windows of 16 tokens use 177 of 177"
    )


def test_progress_is_reported_and_ends_at_one(tmp_path: Path) -> None:
    fractions: list[float] = []
    (tmp_path / "input.txt").write_text("line of text\n" * 20_000)
    text = open_text(str(tmp_path / "input.txt"), tmp_path)
    prepare_tokens(text, BYTES, tmp_path / "cache", 0.1, show_progress=fractions.append)
    assert len(fractions) == 4 and fractions == sorted(fractions) and fractions[-1] == 1


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_an_interrupted_run_leaves_nothing(after: int, tmp_path: Path) -> None:
    """D4, A7: `stop` raises at any moment."""
    (tmp_path / "input.txt").write_text("\f".join(make_documents(30)))
    text = open_text(str(tmp_path / "input.txt"), tmp_path, "\f")
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(text, BYTES, tmp_path / "cache", 0.1, stop=stop)
    assert list((tmp_path / "cache").iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from smollm2.data.building import prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import tokenizer_from_text

folder = Path(sys.argv[1])
prepare_tokens(open_text(str(folder / "input.txt"), folder, "\\f"), tokenizer_from_text("bytes"), folder / "cache", 0.1,
               show_progress=lambda fraction: os._exit(9) if fraction > 0.5 else None)
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere leftovers stay until a person removes them")
def test_a_killed_run_starts_again_cleanly(tmp_path: Path) -> None:
    documents = "\f".join(make_documents(60))
    (tmp_path / "input.txt").write_text(documents)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == 9
    assert len(list((tmp_path / "cache").iterdir())) == 1
    store = prepare(tmp_path, documents, 0.1)
    assert list((tmp_path / "cache").iterdir()) == [store.folder]
    assert len(store.train) + len(store.validation) == len(documents) + 1


def test_a_tilde_in_cache_dir_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "input.txt").write_text("some text")
    store = prepare_tokens(open_text("~/input.txt", Path("~/cache")), BYTES, Path("~/cache"), 0.0)
    assert store.folder.parent == tmp_path / "cache"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(
        ResourceError, match=r"cache: the tokens cannot be written there \(.*\)\. .*set data\.cache_dir"
    ):
        prepare(tmp_path, "some text")


def test_the_index_is_plain_json(tmp_path: Path) -> None:
    store = prepare(tmp_path, "some text")
    header = json.loads((store.folder / "index.json").read_text())
    assert header["fingerprint"] == store.fingerprint and header["statistics"]["train_tokens"] == 10


MEMORY = """
import resource, sys
from pathlib import Path
from smollm2.data.building import prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import load_tokenizer, train_tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

folder = Path(sys.argv[1])
tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 300)
text = open_text(str(folder / "input.txt"), folder)
before = peak()
store = prepare_tokens(text, tokenizer, folder / "cache", 0.05)
print(peak() - before, store.statistics.tokens * 2, store.statistics.characters)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs getrusage")
def test_tokenizing_a_large_text_stays_within_its_memory(tmp_path: Path) -> None:
    """D4: 16 MB of lines, one line of 8 MB, and a million spaces in a row, which go to the library that needs more memory."""
    lines = "".join(f"The cat sat on mat {i}, and left.\n" for i in range(480_000))
    (tmp_path / "input.txt").write_text(lines + "x" * 2**22 + "\U0001f600" * 2**20 + " " * 2**20 + lines[:100])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, check=True, text=True, timeout=120
    )
    used, file_size, characters = map(int, done.stdout.split())
    assert characters == len(lines) + 2**22 + 2**21 + 100
    assert used < 300_000_000 + file_size, f"{used / 1e6:.0f} MB"


@pytest.fixture(scope="module", autouse=True)
def _make_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("store")


FOLDER = Path()
