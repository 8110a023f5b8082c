"""The keys: their rules, the defaults that follow other keys, and what each key allows alone but not together."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from smollm2.config.reading import FIELDS
from smollm2.config.schema import SECTIONS, Config, contradictions


def build(**sections: dict[str, object]) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize("key", FIELDS)
def test_each_key_has_a_sentence_and_a_rule_for_a_resume(key: str) -> None:
    section, name = key.split(".")
    assert FIELDS[key].description.endswith(".")
    assert SECTIONS[section].resume_rule(name) in ("free", "noted", "refused")


@pytest.mark.parametrize("key", FIELDS)
def test_each_default_is_within_its_own_bounds(key: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(Config(), section), name)
    assert getattr(getattr(build(**{section: {name: value}}), section), name) == value


def test_an_empty_config_has_no_contradictions() -> None:
    assert contradictions(Config()) == []


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"model": {"num_attention_heads": 6}}, "model.num_key_value_heads", 6),
        ({"model": {"hidden_size": 384, "num_attention_heads": 6}}, "model.head_dim", 64),
        ({"model": {"max_position_embeddings": 64}}, "training.sequence_length", 64),
        ({"model": {"max_position_embeddings": 64}}, "data.stride", 64),
        ({"training": {"sequence_length": 32}}, "data.stride", 32),
        ({"training": {"train_steps": 50}}, "training.decay_steps", 10),
        ({"training": {"save_dir": "runs/a/checkpoints"}}, "data.cache_dir", str(Path("runs/a/cache"))),
    ],
)
def test_a_default_follows_the_key_that_decides_it(
    given: dict[str, dict[str, object]], key: str, value: object
) -> None:
    section, name = key.split(".")
    assert getattr(getattr(build(**given), section), name) == value


@pytest.mark.parametrize(
    ("given", "key", "words"),
    [
        ({"model": {"hidden_size": 100}}, "model.num_attention_heads", "12 heads do not divide model.hidden_size 100"),
        ({"model": {"num_key_value_heads": 5}}, "model.num_key_value_heads", "5 key-value heads do not divide 12"),
        ({"training": {"sequence_length": 4096}}, "training.sequence_length", "4096 is longer than"),
        ({"data": {"stride": 2049}}, "data.stride", "2049 is longer than training.sequence_length 2048"),
        ({"training": {"min_learning_rate": 0.1}}, "training.min_learning_rate", "0.1 is above"),
        ({"data": {"document_mask": True}}, "data.document_mask", "acts only where data.document_separator is set"),
        ({"training": {"betas": [0.9, 1.0]}}, "training.betas", "beta 2 is 1"),
        ({"training": {"betas": [-0.1, 0.9]}}, "training.betas", "beta 1 is -0.1"),
        ({"training": {"keep_every": 5}}, "training.keep_every", "training.keep_last is set"),
    ],
)
def test_keys_that_contradict_each_other_are_named(given: dict[str, dict[str, object]], key: str, words: str) -> None:
    [(found, sentence)] = contradictions(build(**given))
    assert found == key
    assert words in sentence


@pytest.mark.parametrize(
    "given",
    [
        {"model": {"hidden_size": 100, "head_dim": 64}},
        {"training": {"train_steps": 5, "warmup_steps": 100, "decay_steps": 50, "save_interval": 7}},
        {"training": {"sample_tokens": 10_000}},
        {"model": {"num_key_value_heads": 1}},
    ],
)
def test_what_merely_looks_odd_is_allowed(given: dict[str, dict[str, object]]) -> None:
    assert contradictions(build(**given)) == []


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().training.seed = 1  # type: ignore[misc]


def test_another_vocabulary_leaves_everything_else_as_it_is() -> None:
    config = Config()
    other = config.with_vocab_size(257)
    assert other.model.vocab_size == 257
    assert other.with_vocab_size(config.model.vocab_size) == config


def test_the_global_batch_is_the_product() -> None:
    assert build(training={"batch_size": 3, "gradient_accumulation_steps": 5}).global_batch_size == 15
