"""The comparison of tokenizers: each figure against a count by hand."""

from pathlib import Path

import pytest
from runs import WORDS, tiny_config, write_tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models

from smollm2.data.corpus import Listener
from smollm2.data.tokenizer import load_tokenizer
from smollm2.data.tokenizer_comparison import SAMPLE, TokenizerMeasure, compare_tokenizers
from smollm2.errors import DataError
from smollm2.model.transformer import SmolLM2


def compare(folder: Path, *names: str, text: str = WORDS * 40, tied: bool = True) -> list[TokenizerMeasure]:
    write_tiny(folder, text=text)
    config = tiny_config(folder, model__vocab_size=300, model__tie_word_embeddings=str(tied).lower())
    return compare_tokenizers(config, names, Listener(lambda message: None, lambda label, fraction, size: None))


def test_the_names_are_in_the_order_given_and_no_tokens_are_written(tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path / "saved")
    names = ["bytes", str(tmp_path / "saved"), "auto"]
    assert [found.name for found in compare(tmp_path, *names)] == names
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_and_the_embeddings_share_are_those_of_the_model(tied: bool, tmp_path: Path) -> None:
    (found,) = compare(tmp_path, "bytes", tied=tied)
    config = tiny_config(tmp_path, model__tie_word_embeddings=str(tied).lower()).with_vocab_size(257).model
    assert found.parameters == sum(weight.numel() for weight in SmolLM2(config).parameters())
    assert found.embedding_share == pytest.approx((1 if tied else 2) * 257 * 32 / found.parameters)


@pytest.mark.parametrize(("text", "share"), [("cat", 0.0), ("cats", 0.25), ("cat \u00f6", 1 / 3), ("xyz", 1.0)])
def test_bytes_that_cannot_be_encoded_are_a_share_of_the_text(text: str, share: float, tmp_path: Path) -> None:
    backend = Backend(models.BPE({"<|endoftext|>": 0, "c": 1, "a": 2, "t": 3}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    (found,) = compare(tmp_path, str(tmp_path), text=text)
    assert found.unknown_share == pytest.approx(share)


def test_a_long_text_is_measured_on_a_sample_of_all_of_it(tmp_path: Path) -> None:
    """The second half is Chinese, of three bytes per character: no sample of one half has this share of it."""
    backend = Backend(models.BPE({"<|endoftext|>": 0, "a": 1, "\n": 2}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    lines = SAMPLE // 60
    text = ("a" * 59 + "\n") * lines + ("\u6f22" * 20 + "a\n") * lines
    (found,) = compare(tmp_path, str(tmp_path), text=text)
    assert found.unknown_share == pytest.approx(60 / 122, abs=0.06)


def test_a_name_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no/such/folder: there is no such folder"):
        compare(tmp_path, "bytes", "./no/such/folder")
