"""Tokenizers: text comes back, tiktoken and tokenizers agree, and bytes that cannot be encoded are counted."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from smollm2.data.token_bytes import map_bytes
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.errors import DataError

CORPUS = "The cat sat on the mat. It's 3.14 o'clock, isn't it?\n\tOne  two   three\r\nna\u00efve \u6f22\u5b57 \U0001f600 the the cat cat\n"
HOSTILE = [
    "",
    " ",
    "\n\n\n a",
    "a  1  b \n\n 2\t\t3",
    "it's we'll I'D 'tis ''s",
    "<|endoftext|> <|im_start|>user<|im_end|>",
    "\x00\x01\x7f\u0085\u00a0\u2028\u3000\ufeff",
    "\u0661\u0662 \u00bd\u00b2 \u2167 1\u06f23",
    "a\u0301\u0300 \u200d\U0001f468\u200d\U0001f469 \U0010ffff \U00050000",
    "x" * 5000 + " " * 5000 + "1" * 50,
    "\r\n \r\n\r \n",
    "_-_ __1__ a_b",
]


@pytest.fixture(autouse=True, scope="module")
def _encode_short_texts_fast() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smollm2.data.tokenizer.FAST_FROM", 0)
        yield


def encode_with_tokenizers(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of the same text from the other library."""
    backend = Backend.from_str(tokenizer.text)
    backend.encode_special_tokens = True
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def error_of(text: str) -> str:
    """Return the message of a hostile tokenizer's DataError, or an empty string if it works."""
    try:
        tokenizer_from_text(text).encode("Hello 1 \u00e9")
    except DataError as error:
        return str(error)
    return ""


def word_level(unknown: str | None, *words: str) -> str:
    vocab = {word: i for i, word in enumerate(["<|endoftext|>", *words])}
    backend = Backend(models.WordLevel(vocab, unk_token=unknown) if unknown else models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    text: str = backend.to_str()
    return text


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([CORPUS] * 3, 400)


def test_byte_ids_are_the_bytes_and_256_ends_a_text() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.unknown, tokenizer.text) == (257, 256, None, "bytes")
    assert tokenizer.encode("a\u00e9\n") == [97, 195, 169, 10]
    assert tokenizer.bytes_per_token.tolist() == [1] * 256 + [0]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(trained: Tokenizer, text: str) -> None:
    for tokenizer in (trained, tokenizer_from_text("bytes")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_and_both_libraries_agree(text: str) -> None:
    tokenizer = TRAINED
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == encode_with_tokenizers(tokenizer, text)
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


def test_tiktoken_and_tokenizers_agree_on_shakespeare_and_on_hostile_text(
    shakespeare: Path, smollm2_tokenizer_folder: Path
) -> None:
    text = shakespeare.read_text(encoding="utf-8")
    own = train_tokenizer([text], 4096)
    smollm2 = load_tokenizer(str(smollm2_tokenizer_folder))
    assert len(smollm2.encode(text)) == 341_094
    for tokenizer in (own, smollm2):
        assert tokenizer._fast is not None
        for sample in (text[:300_000], *HOSTILE):
            assert tokenizer.encode(sample) == encode_with_tokenizers(tokenizer, sample)


def test_the_fast_encoder_is_prepared_only_for_much_text(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smollm2.data.tokenizer.FAST_FROM", 100)
    tokenizer = tokenizer_from_text(trained.text)
    for used in (False, True):
        assert tokenizer.encode("a" * 99) == trained.encode("a" * 99)
        assert ("_fast" in vars(tokenizer)) is used


def test_both_libraries_agree_on_code_points_of_every_plane(trained: Tokenizer) -> None:
    points = [*range(0x3100), *range(0x1F000, 0x1FB00), *random.Random(0).sample(range(0xE000, 0x110000), 6000)]
    for first in range(0, len(points), 500):
        text = "".join(f"a{c}b .{c}. 1{c}1  {c}  {c}{c}\n{c}\n" for c in map(chr, points[first : first + 500]))
        assert trained.encode(text) == encode_with_tokenizers(trained, text)


@pytest.mark.parametrize("run", [" ", "\n", "\x85"])
def test_a_million_spaces_do_not_reach_tiktokens_panic(trained: Tokenizer, run: str) -> None:
    text = "a" + run * (2**20 // len(run)) + "b"
    assert trained.decode(trained.encode(text)) == text


def test_smollm2s_own_vectors(smollm2_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_tokenizer_folder))
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.unknown) == (49152, 0, None)
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.encode("1234567") == list(range(33, 40))


def test_bytes_that_smollm2_has_no_token_for_are_dropped_and_counted(smollm2_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_tokenizer_folder))
    ids, lost = tokenizer.encode_counted("a\x04b\x06")
    assert (tokenizer.decode(ids), lost) == ("ab", 2)


def test_special_token_text_is_plain_text(smollm2_tokenizer_folder: Path) -> None:
    for tokenizer in (load_tokenizer(str(smollm2_tokenizer_folder)), tokenizer_from_text("bytes"), TRAINED):
        ids = tokenizer.encode("<|endoftext|>")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == "<|endoftext|>"


def test_a_word_that_is_a_special_token_is_not_expressed() -> None:
    backend = Backend(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "cat": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    assert tokenizer_from_text(backend.to_str()).encode_counted("cat <|endoftext|> cat") == ([2, 1, 2], 13)


def test_special_tokens_decode_to_nothing(trained: Tokenizer) -> None:
    assert trained.decode([trained.end_of_text, *trained.encode("the cat"), trained.end_of_text]) == "the cat"


def test_training_gives_the_same_tokenizer_each_time_and_end_of_text_is_0(trained: Tokenizer) -> None:
    again = train_tokenizer([CORPUS] * 3, 400)
    assert again.text == trained.text and again.fingerprint == trained.fingerprint
    assert trained.end_of_text == 0


def test_the_vocabulary_shrinks_to_what_the_corpus_supports() -> None:
    assert train_tokenizer(["ab ab ab"], 32_000).vocab_size < 262
    assert train_tokenizer(["ab ab ab"], 10).vocab_size == 257


def test_a_trained_tokenizer_expresses_text_it_never_saw(trained: Tokenizer) -> None:
    text = "\u0416\u0438\u0437\u043d\u044c \U0001f680 \x00 12"
    assert trained.encode_counted(text)[1] == 0
    assert trained.decode(trained.encode(text)) == text


def test_digits_are_split(trained: Tokenizer) -> None:
    assert len(trained.encode("3.14")) == 4


def test_a_long_line_of_dna_comes_back_with_more_than_a_byte_per_token() -> None:
    line = "".join(random.Random(0).choices("ACGT", k=400_000))
    tokenizer = train_tokenizer([line], 512)
    ids = tokenizer.encode(line)
    assert tokenizer.vocab_size == 512 and tokenizer.decode(ids) == line
    assert len(line) / len(ids) > 3


def test_no_word_is_longer_than_256_characters_and_a_space() -> None:
    tokenizer = train_tokenizer(["a" * 100_000 + " " * 100_000 + "\n" * 100_000] * 2, 2000)
    assert 128 <= tokenizer.bytes_per_token.max() <= 257


CODE = (
    "import os\n\n\nclass Box:\n    def open(self):\n        for x in self:\n            print(x)\n\n    size = 1\n\n\n"
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (":\n    def", [":", "\n   ", " def"]),
        (":\n        for", [":", "\n       ", " for"]),
        (":\n            print", [":", "\n           ", " print"]),
        (")\n\n    size", [")", "\n\n   ", " size"]),
        ("s\n\n\nclass", ["s", "\n\n", "\n", "class"]),
    ],
)
def test_newlines_and_indentation_of_source_code_become_single_tokens(text: str, tokens: list[str]) -> None:
    """The last white space before a word is separate, or part of the word if it is a space, as in SmolLM2."""
    tokenizer = train_tokenizer([CODE * 20], 400)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == tokens


@pytest.mark.parametrize("source", ["bytes", "trained"])
def test_a_saved_tokenizer_loads_with_the_same_ids(source: str, tmp_path: Path, trained: Tokenizer) -> None:
    tokenizer = trained if source == "trained" else tokenizer_from_text("bytes")
    tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(str(tmp_path / "tokenizer"))
    assert again.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert (again.end_of_text, again.vocab_size) == (tokenizer.end_of_text, tokenizer.vocab_size)


def test_a_checkpoints_text_and_end_of_text_are_the_whole_tokenizer(smollm2_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_tokenizer_folder))
    again = tokenizer_from_text(tokenizer.text, tokenizer.end_of_text)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.bytes_per_token, tokenizer.bytes_per_token)


def test_another_end_of_text_is_another_fingerprint(smollm2_tokenizer_folder: Path) -> None:
    text = (smollm2_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    assert tokenizer_from_text(text, 0).fingerprint != tokenizer_from_text(text, 2).fingerprint


@pytest.mark.parametrize(
    ("configs", "end_of_text"),
    [
        ({}, 0),
        ({"tokenizer_config.json": {"eos_token": "cat"}}, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "cat"}}}, 2),
        ({"config.json": {"eos_token_id": 1}}, 1),
        ({"config.json": {"eos_token_id": [2, 1]}}, 2),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 1}}, 1),
        ({"config.json": {"eos_token_id": 99}}, 0),
    ],
)
def test_the_end_of_text_is_the_folders_own(configs: dict[str, Any], end_of_text: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_level("[UNK]", "[UNK]", "cat"))
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path)).end_of_text == end_of_text


def test_an_unknown_id_stands_for_what_cannot_be_encoded() -> None:
    tokenizer = tokenizer_from_text(word_level("[UNK]", "[UNK]", "cat"))
    assert tokenizer.unknown == 1
    assert tokenizer.encode_counted("cat d\u00f6g cat") == ([2, 1, 2], 4)


def test_without_an_unknown_id_the_characters_are_dropped_and_counted() -> None:
    tokenizer = tokenizer_from_text(word_level(None, "c", "a", "t"))
    assert tokenizer.unknown is None
    assert tokenizer.encode_counted("cat d\u00f6g") == ([1, 2, 3], 4)


def test_a_tokenizer_that_is_not_byte_level_goes_to_the_other_library() -> None:
    backend = Backend(models.BPE(map_bytes() | {"<|endoftext|>": 256}, []))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer_from_text(backend.to_str())._fast is None


def test_merges_that_tiktoken_would_make_differently_go_to_the_other_library() -> None:
    """'abc' is in the vocabulary as ab + c, but b + c is made first: alone it never encodes to itself."""
    vocab = map_bytes() | {"bc": 256, "ab": 257, "abc": 258, "<|endoftext|>": 259}
    backend = Backend(models.BPE(vocab, [("b", "c"), ("a", "b"), ("ab", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizer_from_text(backend.to_str())
    assert tokenizer._fast is None
    assert tokenizer.encode("abc") == [97, 256]


def test_two_tokens_of_one_id_are_refused() -> None:
    spec = json.loads(tokenizer_from_text("bytes")._backend.to_str())
    spec["model"]["vocab"]["bc"] = 97
    spec["model"]["merges"] = [["b", "c"]]
    assert "two tokens share an id" in error_of(json.dumps(spec))


def test_half_a_surrogate_pair_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"text, character 1: \\udc80 is half of a surrogate pair"):
        trained.encode("a\udc80")


HOSTILE_FILES = [
    "",
    "null",
    "{}",
    "[" * 100_000,
    '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    '{"model": {"type": "BPE", "vocab": {"a": 4000000000, "<|endoftext|>": 1}, "merges": []}}',
    '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}',
    '{"model": {"type": "Evil", "vocab": {"a": -1}}}',
]


@pytest.mark.parametrize("content", HOSTILE_FILES)
def test_a_hostile_tokenizer_json_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_mutated_tokenizer_json_loads_or_is_one_line() -> None:
    whole = tokenizer_from_text("bytes")._backend.to_str()
    spec = json.loads(whole)
    values: list[object] = [None, -1, 2**40, 1.5, "x", [], {}, True, {"type": "BPE"}]
    for section in ("pre_tokenizer", "decoder", "model", "normalizer", "added_tokens"):
        fields = list(spec[section]) if isinstance(spec[section], dict) else []
        for field in [None, *fields]:
            for value in values:
                changed = json.loads(whole)
                if field is None:
                    changed[section] = value
                else:
                    changed[section][field] = value
                assert "\n" not in error_of(json.dumps(changed))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    tokenizer_from_text("bytes").save(tmp_path / "tokenizer")
    assert load_tokenizer("~/tokenizer").vocab_size == 257


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_neither_folder_nor_hub_name_is_refused_without_a_network() -> None:
    reported: list[str] = []
    with pytest.raises(DataError, match="there is no such folder, and this is not a hub name"):
        load_tokenizer("./no/such/folder", report=reported.append)
    assert reported == []


HUB = """
import sys
from smollm2.errors import DataError
from smollm2.data.tokenizer import load_tokenizer
try:
    print(load_tokenizer(sys.argv[1], report=lambda message: print("report:", message)).encode("ab"))
except DataError as error:
    print(error)
"""


def load_from_hub(name: str, cache: Path) -> list[str]:
    """Return what a process without a network prints when it loads `name` from the hub with this cache."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, name], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_a_hub_name_is_searched_for_on_this_machine_first(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--letters"
    tokenizer_from_text("bytes").save(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load_from_hub("someone/letters", tmp_path) == ["[97, 98]"]


def test_an_attempt_to_download_is_announced_and_its_failure_is_one_line(tmp_path: Path) -> None:
    line, error = load_from_hub("someone/absent", tmp_path)
    assert line.startswith("report: someone/absent: the tokenizer is not on this machine; trying the Hugging Face hub")
    assert error.startswith("someone/absent: there is no such folder, and the download from the hub failed")
    assert "hf download someone/absent" in error


TRAINED = train_tokenizer([CORPUS] * 3, 400)
