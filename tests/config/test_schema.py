"""The keys: their rules, the defaults that depend on other keys, and values that contradict each other."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smollm2.config.schema import FIELDS, SECTIONS, Config


def build(**sections: dict[str, object]) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize("key", FIELDS)
def test_each_key_has_a_sentence_and_a_rule_for_a_resume(key: str) -> None:
    section, name = key.split(".")
    assert (FIELDS[key].description or "").endswith(".")
    assert SECTIONS[section].resume_rule(name) in ("free", "noted", "refused")


@pytest.mark.parametrize("key", FIELDS)
def test_each_default_is_within_its_own_bounds(key: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(Config(), section), name)
    assert getattr(getattr(build(**{section: {name: value}}), section), name) == value


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


CONTRADICTIONS: list[tuple[dict[str, dict[str, object]], str, str]] = [
    (
        {"model": {"hidden_size": 100}},
        "model.num_attention_heads",
        "must be a divisor of model.hidden_size = 100 (got 12)",
    ),
    (
        {"model": {"hidden_size": 36}},
        "model.num_attention_heads",
        "model.hidden_size = 36 gives 12 heads a width of 3",
    ),
    (
        {"model": {"hidden_size": 12}},
        "model.num_attention_heads",
        "model.hidden_size = 12 gives 12 heads a width of 1",
    ),
    (
        {"model": {"num_key_value_heads": 5}},
        "model.num_key_value_heads",
        "must be a divisor of model.num_attention_heads = 12 (got 5)",
    ),
    ({"training": {"sequence_length": 4096}}, "training.sequence_length", "is greater than"),
    ({"data": {"validation_input": "input.txt"}}, "data.validation_input", "is the training text"),
    ({"data": {"stride": 2049}}, "data.stride", "is greater than training.sequence_length = 2048 (got 2049)"),
    (
        {"data": {"stride": 1024, "pack": "best_fit"}},
        "data.stride",
        "has no effect with data.pack = best_fit (got 1024)",
    ),
    ({"data": {"mixture": {"a": 0.5, "b": 0.4}}}, "data.mixture", "the weights add up to 0.9, not to 1"),
    (
        {"data": {"mixture": {"a": [1, 0.5], "b": [0, 0.4]}, "stages": ["9"]}},
        "data.mixture",
        "the weights add up to 0.9 in stage 2, not to 1",
    ),
    ({"data": {"mixture": {"a": [0.5, 0.5], "b": 0.5}}}, "data.mixture", "'a' has 2 weights, but there are 1 stages"),
    ({"data": {"mixture": {"a": 0.33333, "b": 0.66667}}}, "data.mixture", "0.33333 of 'a' has more than four decimals"),
    ({"data": {"mixture": {"a": 1}, "input": "b"}}, "data.mixture", "cannot be combined with data.input"),
    ({"data": {"stages": ["9"]}}, "data.stages", "has no effect without data.mixture"),
    ({"data": {"mixture": {"a": 1}, "stages": ["9", "8"]}}, "data.stages", "must ascend (got the steps 9, 8)"),
    (
        {"training": {"min_learning_rate": 0.1}},
        "training.min_learning_rate",
        "is above training.learning_rate = 0.0001",
    ),
    ({"data": {"document_mask": True}}, "data.document_mask", "has no effect without data.document_separator"),
    ({"training": {"keep_every": 5}}, "training.keep_every", "has no effect without training.keep_last"),
]


CONSTRUCTOR: Any = Config
PATHS_TO_A_CONFIG: dict[str, Callable[[dict[str, dict[str, object]]], object]] = {
    "model_validate": Config.model_validate,
    "model_validate_json": lambda given: Config.model_validate_json(json.dumps(given)),
    "constructor": lambda given: CONSTRUCTOR(**given),
    "sections": lambda given: CONSTRUCTOR(**{name: SECTIONS[name](**keys) for name, keys in given.items()}),
}


@pytest.mark.parametrize("path", PATHS_TO_A_CONFIG)
@pytest.mark.parametrize(("given", "key", "words"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_named_on_every_path(
    given: dict[str, dict[str, object]], key: str, words: str, path: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        PATHS_TO_A_CONFIG[path](given)
    [problem] = caught.value.errors()
    assert problem["ctx"]["keys"][0] == key
    assert words in problem["msg"]


@pytest.mark.parametrize(
    ("section", "given"),
    [(section, keys) for given, _, _ in CONTRADICTIONS for section, keys in given.items() if section == "model"],
)
def test_a_section_alone_is_checked_too(section: str, given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SECTIONS[section](**given)


@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9]])
def test_a_beta_is_at_least_0_and_below_1(betas: list[float]) -> None:
    with pytest.raises(ValidationError):
        build(training={"betas": betas})


@pytest.mark.parametrize(
    "given",
    [
        {"model": {"hidden_size": 100, "head_dim": 64}},
        {"training": {"train_steps": 5, "warmup_steps": 100, "decay_steps": 50, "save_interval": 7}},
        {"training": {"sample_tokens": 10_000}},
        {"model": {"num_key_value_heads": 1}},
    ],
)
def test_an_unusual_config_is_allowed(given: dict[str, dict[str, object]]) -> None:
    build(**given)


def test_a_shape_that_transformers_5_refuses_is_a_warning() -> None:
    shape = {"hidden_size": 96, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16}
    config = build(model={**shape, "norm": "rmsnorm"})
    [line] = config.warnings()
    assert "hidden_size 96 is not a multiple of model.num_attention_heads 5" in line
    assert "transformers 5 will not load" in line
    assert Config().warnings() == []


SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"norm": "layernorm", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32},
            "whose total width is 128",
        ),
        ({"norm": "layernorm", "rope_scaling": SCALING}, "model.rope_scaling cannot be exported to gguf"),
    ],
)
def test_what_an_export_will_refuse_is_said_before_training(model: dict[str, object], words: str) -> None:
    [line] = build(model=model).warnings()
    assert words in line and "cannot be exported" in line


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"factor": 8}, "must have exactly factor, low_freq_factor"),
        ({**SCALING, "more": 1}, "(wrong: more)"),
        ({**SCALING, "factor": 0}, "needs numbers above 0"),
        ({**SCALING, "low_freq_factor": 4}, "high_freq_factor above low_freq_factor"),
    ],
)
def test_a_rope_scaling_has_four_numbers_that_fit(scaling: dict[str, float], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        build(model={"rope_scaling": scaling})


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().training.seed = 1


def test_another_vocabulary_leaves_everything_else_as_it_is() -> None:
    config = Config()
    other = config.with_vocab_size(257)
    assert other.model.vocab_size == 257
    assert other.with_vocab_size(config.model.vocab_size) == config


def test_the_global_batch_is_the_product() -> None:
    assert build(training={"batch_size": 3, "gradient_accumulation_steps": 5}).global_batch_size == 15


@pytest.mark.parametrize("name", ["notes", "rows.jsonl", "dump.parquet", "notes/*.md", "me/stories"])
def test_documents_of_another_input_than_one_text_need_no_separator_to_be_isolated(name: str) -> None:
    assert Config.model_validate({"data": {"input": name, "document_mask": True}}).data.document_mask
