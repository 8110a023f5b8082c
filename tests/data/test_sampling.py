"""What a tokenizer is trained on: its size, its spread over the text, and the limits for its words."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from smollm2.data.sampling import LONG_RUN, WORD, count_fitting, limit_words, split_long_runs, spread_evenly
from smollm2.data.sources import Rules, open_input

LENGTHS = {
    "equal": [1000] * 200,
    "tiny ones, then long ones": [10] * 5000 + [20_000] * 8,
    "long ones, then tiny ones": [20_000] * 8 + [10] * 5000,
    "short and long in turn": [10, 2000] * 100,
    "random": random.Random(0).choices(range(1, 5000), k=100),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("limit", [1, 30_000, 100_000])
def test_at_every_point_the_sample_is_its_share_of_the_text_within_one_part(lengths: list[int], limit: int) -> None:
    size, seen, taken = sum(lengths), 0, 0

    def read() -> Iterator[bytes]:
        nonlocal seen
        for length in lengths:
            assert abs(taken - seen * limit / size) <= max(lengths)
            yield b"a" * length
            seen += length

    for text in spread_evenly(read(), size, limit):
        taken += len(text)
    assert abs(taken - limit) <= max(lengths)


@pytest.mark.parametrize("limit", [6, 7, 10**9])
def test_a_text_within_the_limit_is_taken_whole(limit: int) -> None:
    assert list(spread_evenly([b"a", b"", b"bcd", b"ef"], 6, limit)) == [b"a", b"", b"bcd", b"ef"]


def test_a_sample_is_spread_over_long_files_and_rows_of_a_few_words_by_their_bytes(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": "b" * 50}) + "\n" for _ in range(20_000))
    for name, content in {"a.txt": "a a\n" * 500_000, "b.jsonl": rows, "c.txt": "cc\n" * 300_000}.items():
        (tmp_path / name).write_text(content)
    sample = "".join(open_input(str(tmp_path), tmp_path, Rules()).sample(1_000_000))
    shares = [sample.count("a a\n") * 4 / 2_000_000, sample.count("b") / 1_000_000, sample.count("cc\n") * 3 / 900_000]
    assert shares == pytest.approx([1 / 3.9] * 3, abs=0.12)
    assert len(sample) < 1_000_000 + 2**17


def test_the_same_documents_give_the_same_sample_from_text_and_from_rows(tmp_path: Path) -> None:
    counts = random.Random(0).choices(range(2000), k=100)
    documents = [f"document {i} " + "word " * count for i, count in enumerate(counts)]
    (tmp_path / "a.txt").write_text("\f\f".join(["", *documents]), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    text, rows = (
        open_input(str(tmp_path / name), tmp_path, Rules(separator="\f")).sample(100_000)
        for name in ("a.txt", "a.jsonl")
    )
    assert list(text) == list(rows)


@pytest.mark.parametrize(
    "text", ["ACGT" * 500, " \n\t" * 500, "\u6f22" * 1500, "a" * 300 + " " * 300 + "b c", "", "--" * 400]
)
def test_no_part_has_a_run_longer_than_256_and_the_parts_are_the_text(text: str) -> None:
    parts = list(split_long_runs(text))
    assert "".join(parts) == text
    assert all(len(run.group()) == len(part) for part in parts for run in [LONG_RUN.search(part)] if run)


def different_words(texts: list[str]) -> int:
    return sum(len(word.encode()) for word in {word for text in texts for word in WORD.findall(text)})


def test_texts_with_too_many_different_words_are_thinned_out_evenly() -> None:
    letters = random.Random(0)
    texts = [f"{i} " + "".join(letters.choices("ACGT", k=1000)) for i in range(200)]
    kept = list(limit_words(texts, 50_000))
    assert 25_000 < different_words(kept) <= 50_000
    numbers = [int(text.split()[0]) for text in kept]
    assert numbers[0] == 0 and numbers[-1] > 190
    assert max(second - first for first, second in itertools.pairwise(numbers)) <= 8


def test_texts_whose_words_are_repeated_are_kept_whole() -> None:
    texts = [f"one two three four {' '.join(['one', 'two', 'three'][i % 3 :])}" for i in range(200)]
    assert list(limit_words(texts, 100)) == texts


@pytest.mark.parametrize("texts", [[], ["x" * 200], ["x" * 10, "y" * 200], ["x" * 200, "y" * 10]])
def test_texts_longer_than_the_limit_for_words_leave_the_first_one(texts: list[str]) -> None:
    assert list(limit_words(texts, 5)) == texts[:1]


def test_a_word_counts_once_and_in_bytes() -> None:
    assert count_fitting([b"ab", b"ab", "\u6f22".encode(), b"c"], 5) == 7
