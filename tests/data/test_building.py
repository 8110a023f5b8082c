"""Building a store: the same bytes for any number of threads and any interruption, verified, and read as one stream."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.building import STATE, prepare_tokens
from smollm2.data.shards import HEADER_SIZE
from smollm2.data.store import TokenStore, open_tokens
from smollm2.data.stream import Piece, Stream
from smollm2.data.text import open_text
from smollm2.data.tokenizer import tokenizer_from_text
from smollm2.data.windows import Windows
from smollm2.errors import DataError

BYTES = tokenizer_from_text("bytes")
SHARD = 2**17
"""Characters in a shard of these tests."""


def write_documents(folder: Path, count: int = 3000, seed: int = 0) -> Path:
    """A text of several shards: documents of very different lengths, separated by form feeds."""
    r = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "größer", "猫"]
    texts = (" ".join(r.choice(words) for _ in range(int(r.lognormvariate(3.5, 1.5)) + 1)) for _ in range(count))
    path = folder / "documents.txt"
    path.write_text("\f".join(texts), encoding="utf-8")
    return path


def build(path: Path, cache: Path, workers: int = 0) -> TokenStore:
    text = open_text(str(path), cache, "\f")
    return prepare_tokens(text, BYTES, cache, 0.1, shard_characters=SHARD, workers=workers)


def contents(folder: Path) -> dict[str, str]:
    """The digest of each file: pytest would print the bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The store of an uninterrupted build with one thread."""
    return build(path, tmp_path_factory.mktemp("whole"), workers=1)


@pytest.mark.parametrize("workers", [2, 5])
def test_the_store_does_not_depend_on_the_number_of_workers(
    workers: int, path: Path, whole: TokenStore, tmp_path: Path
) -> None:
    assert len(whole.index.train) > 3 and len(whole.index.validation) > 3
    assert contents(build(path, tmp_path, workers=workers).folder) == contents(whole.folder)


@pytest.mark.parametrize("after", [1, 2000, 2600, 5000])
def test_an_interrupted_build_is_continued_after_its_last_whole_shard(
    after: int, path: Path, whole: TokenStore, tmp_path: Path
) -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    text = open_text(str(path), tmp_path, "\f")
    interrupted = False
    try:
        prepare_tokens(text, BYTES, tmp_path, 0.1, shard_characters=SHARD, stop=stop)
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (calls >= after)
    fractions: list[float] = []
    store = prepare_tokens(text, BYTES, tmp_path, 0.1, shard_characters=SHARD, show_progress=fractions.append)
    assert contents(store.folder) == contents(whole.folder)
    if after == 2600:
        assert fractions[0] > 0.5, "it began again"


@pytest.mark.parametrize("left", [f".{STATE}.tmp.1-0badc0de", "train-00099.bin", ".lock"])
def test_what_a_killed_build_left_does_not_enter_the_store(
    left: str, path: Path, whole: TokenStore, tmp_path: Path
) -> None:
    text = open_text(str(path), tmp_path, "\f")

    def kill_later() -> None:
        for folder in tmp_path.glob(".*.partial"):
            if (folder / STATE).exists():
                (folder / left).write_bytes(b"left")
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(text, BYTES, tmp_path, 0.1, shard_characters=SHARD, stop=kill_later)
    assert contents(build(path, tmp_path).folder) == contents(whole.folder)


KILLED = """
import sys
from pathlib import Path
from smollm2.data.building import prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import tokenizer_from_text

path, cache, characters = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
text = open_text(str(path), cache, "\\f")
print("begins", flush=True)
prepare_tokens(text, tokenizer_from_text("bytes"), cache, 0.1, shard_characters=characters, workers=2)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(
    path: Path, whole: TokenStore, tmp_path: Path
) -> None:
    r, kills = random.Random(1), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(tmp_path), str(SHARD)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stdout.readline() == "begins\n"
        time.sleep(r.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert contents(build(path, tmp_path).folder) == contents(whole.folder)


def test_two_processes_that_need_the_same_tokens_make_them_once(path: Path, whole: TokenStore, tmp_path: Path) -> None:
    text, reports = open_text(str(path), tmp_path, "\f"), list[str]()
    other = open_text(str(path), tmp_path, "\f")
    waiting = threading.Event()

    def show(fraction: float) -> None:
        waiting.wait(10)

    def hear(message: str) -> None:
        reports.append(message)
        waiting.set()

    def wait() -> None:
        prepare_tokens(other, BYTES, tmp_path, 0.1, shard_characters=SHARD, report=hear)

    second = threading.Thread(target=wait)
    begun = threading.Event()

    def stop() -> None:
        if not begun.is_set() and any(tmp_path.glob(".*.partial/train-00000.bin")):
            begun.set()
            second.start()

    store = prepare_tokens(text, BYTES, tmp_path, 0.1, shard_characters=SHARD, show_progress=show, stop=stop)
    second.join(20)
    assert len(reports) == 1 and "waiting for another process" in reports[0]
    assert contents(store.folder) == contents(whole.folder)


def damage_ids(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(HEADER_SIZE + 1000)
        file.write(b"\1")


def replace_by_another(path: Path) -> None:
    other, size = path.with_name("train-00000.bin").read_bytes(), path.stat().st_size
    path.write_bytes(other[:size].ljust(size, b"\0"))


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "ids": (damage_ids, r"train-00001\.bin: the ids do not have the shard's checksum"),
    "another shard": (replace_by_another, r"train-00001\.bin: the shard is not the one that index\.json lists"),
    "no shard": (blank, r"train-00001\.bin: this is not a shard"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_verifying_names_the_damaged_shard(kind: str, path: Path, tmp_path: Path) -> None:
    store = build(path, tmp_path)
    assert store.verify() == len(store.index.train) + len(store.index.validation)
    damage, message = DAMAGES[kind]
    damage(store.folder / "train-00001.bin")
    again = open_tokens(store.folder)
    assert again is not None
    with pytest.raises(DataError, match=message):
        again.verify()


def test_a_document_stays_on_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    def sides(text: str, name: str) -> dict[str, bool]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text, encoding="utf-8")
        opened = open_text(str(tmp_path / name / "a.txt"), tmp_path, "\f")
        return dict(zip(text.split("\f"), map(bool, opened.documents.hold_out(0.1)), strict=True))

    documents = [f"{i} {'word ' * (i % 7 + 1)}" for i in range(3000)]
    small, large = sides("\f".join(documents[:2000]), "small"), sides("\f".join(documents), "large")
    assert all(large[document] == side for document, side in small.items())
    assert 0.05 < sum(small.values()) / len(small) < 0.15


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 2),
    st.integers(1, 12),
)
def test_every_token_but_the_first_is_a_target_once_under_any_shard_size(sizes: list[int], length: int) -> None:
    tokens = np.arange(sum(sizes), dtype="<u2")
    FOLDER.mkdir(exist_ok=True)
    pieces = []
    for number, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        (FOLDER / f"{number}.bin").write_bytes(b"head" + part.tobytes())
        pieces.append(Piece(FOLDER, f"{number}.bin", len(part), 4))
    windows = Windows(Stream([piece for piece in pieces if piece.tokens], tokens.dtype), length, length, 65_536)
    labels = np.concatenate([windows.read(i).labels for i in range(len(windows))])
    assert labels[labels != IGNORE_INDEX].tolist() == tokens[1:].tolist()


@pytest.fixture(scope="module", autouse=True)
def _make_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("pieces")


FOLDER = Path()


def test_a_state_whose_shards_are_gone_is_not_continued(path: Path, whole: TokenStore, tmp_path: Path) -> None:
    partial = tmp_path / f".{whole.folder.name}.partial"
    partial.mkdir()
    (partial / STATE).write_text(
        '{"chunks": 9, "train": [{"file": "train-00000.bin", "tokens": 1, "documents": 0, "sha256": ""}]}'
    )
    assert contents(build(path, tmp_path).folder) == contents(whole.folder)
