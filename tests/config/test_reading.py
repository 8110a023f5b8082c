"""Config files and flags: what is read, what is refused with its line, and where every value came from (D1, D2)."""

import argparse
import json
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smollm2.config.reading import (
    Change,
    add_config_flags,
    changed_on_resume,
    effective_config_yaml,
    load_config,
    load_config_with_origins,
    read_config_flags,
)
from smollm2.config.schema import FIELDS, SECTIONS, Config
from smollm2.config.section import Resume
from smollm2.config.sources import list_presets
from smollm2.config.vocabulary import KEYS, describe_kind, to_yaml
from smollm2.errors import ConfigError
from smollm2.plan.arithmetic import count_parameters

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
Loader = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Load a text as ./config.yaml."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str, **given: Any) -> Config:
        Path("config.yaml").write_text(text, encoding="utf-8", newline="")
        return load_config(**given)

    return load_text


def refusal(load: Loader, text: str, **given: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, **given)
    return str(caught.value)


def flag(key: str, text: str) -> dict[str, dict[str, tuple[str, str]]]:
    return {"flags": {key: (f"--{key}", text)}}


def value_of(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


# What is read


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.learning_rate", "3E-4", 3e-4),
        ("training.learning_rate", ".5", 0.5),
        ("training.learning_rate", "1", 1.0),
        ("training.learning_rate", '"1e-4"', 1e-4),
        ("training.train_steps", "5_000", 5000),
        ("training.train_steps", "1e5", 100_000),
        ("training.train_steps", "5000.0", 5000),
        ("training.train_steps", "010", 10),
        ("training.compile", "yes", True),
        ("training.compile", "Off", False),
        ("training.compile", "auto", "auto"),
        ("training.keep_last", "null", None),
        ("training.keep_last", "", None),
        ("training.keep_last", "3", 3),
        ("training.keep_last", "1e3", 1000),
        ("training.time_limit", "7200", 7200.0),
        ("training.time_limit", "2h", 7200.0),
        ("training.time_limit", "90m", 5400.0),
        ("training.time_limit", "1h30m", 5400.0),
        ("training.time_limit", "1.5d", 129_600.0),
        ("training.time_limit", "1-12:00:00", 129_600.0),
        ("training.time_limit", "00:30:00", 1800.0),
        ("training.time_limit", "null", None),
        ("training.save_dir", "runs/a/", str(Path("runs/a"))),
        ("data.input", "'-'", "-"),
        ("training.betas", "[.8, 1e-1]", (0.8, 0.1)),
        ("training.betas", "\n    - 0.8\n    - 0.1", (0.8, 0.1)),
        ("training.sample_prompts", "[no, 010, 12:30]", ("no", "010", "12:30")),
        ("training.sample_prompts", "[]", ()),
        ("wandb.name", "no", "no"),
        ("wandb.name", "010", "010"),
        ("wandb.name", "1e-4", "1e-4"),
        ("wandb.name", "2026-11-24", "2026-11-24"),
        ("wandb.name", '"null"', "null"),
        ("wandb.name", "'it''s'", "it's"),
        ("data.document_separator", '"\\f"', "\f"),
        ("data.input", "|-\n    a b.txt", "a b.txt"),
    ],
)
def test_a_value_is_typed_by_its_key_from_its_text(load: Loader, key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    found = value_of(load(f"{section}:\n  {name}: {text}\n"), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "training: {learning_rate: 1e-4, betas: [0.9, 0.95]}\n",
        '{"training": {"learning_rate": 1e-4}}',
        "\ufefftraining:\r\n  learning_rate: 1e-4\r\n",
        "---\ntraining:\n  learning_rate: 1e-4 # the highest\nwandb:\n...\n",
        "model: ~\ntraining:\n  learning_rate: 1e-4",
    ],
)
def test_inline_sections_a_byte_order_mark_and_empty_sections_are_read(load: Loader, text: str) -> None:
    assert load(text) == Config()


@pytest.mark.parametrize(
    ("text", "attention", "checkpointing"),
    [
        ("model: {flash_attention: true, gradient_checkpointing: true}", "auto", True),
        ("model: {flash_attention: false, gradient_checkpointing: no}", "eager", False),
        ("model: {flash_attention: false}\ntraining: {attention: eager}", "eager", False),
    ],
)
def test_an_alias_sets_its_key(load: Loader, text: str, attention: str, checkpointing: bool) -> None:
    training = load(text).training
    assert (training.attention, training.gradient_checkpointing) == (attention, checkpointing)


PATH_KEYS = [
    "data.input",
    "data.validation_input",
    "data.regression_input",
    "data.tokenizer",
    "data.cache_dir",
    "training.save_dir",
]


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_tilde_in_a_path_is_the_home_folder(load: Loader, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("/home/somebody")))
    section, name = key.split(".")
    expected = str(Path("/home/somebody/a"))
    assert value_of(load(f"{section}:\n  {name}: ~/a\n"), key) == expected
    assert value_of(load("wandb:", **flag(key, "~/a")), key) == expected
    assert value_of(Config.model_validate({section: {name: "~/a"}}), key) == expected


def test_every_key_that_takes_a_path_is_covered() -> None:
    assert sorted(key for key in FIELDS if "path" in describe_kind(key)) == sorted(PATH_KEYS)


@pytest.mark.parametrize("text", [".", "./", "..", "a/.."])
def test_the_run_folder_has_a_name_and_its_cache_is_beside_it(load: Loader, text: str) -> None:
    config = load(f"training:\n  save_dir: {text}\n")
    folder = Path(config.training.save_dir)
    assert folder == Path(text).resolve()
    assert Path(config.data.cache_dir) == folder.with_name("cache")


def test_flags_win_over_the_file_and_arguments_over_flags(load: Loader) -> None:
    text = "training: {seed: 1, train_steps: 1, batch_size: 1}"
    flags = {"training.seed": ("--training.seed", "2"), "training.train_steps": ("--train_steps", "2")}
    training = load(text, flags=flags, training={"train_steps": 3}).training
    assert (training.batch_size, training.seed, training.train_steps) == (1, 2, 3)


def test_a_flag_outranks_an_alias_in_the_file_and_the_other_way_round(load: Loader) -> None:
    assert load("model: {flash_attention: true}", **flag("training.attention", "eager")).training.attention == "eager"
    assert load("training: {attention: sdpa}", **flag("model.flash_attention", "false")).training.attention == "eager"


def test_arguments_may_be_sections_or_dotted_keys(load: Loader) -> None:
    config = load("", **{"preset": "nano", "training.seed": 7, "wandb": {"tags": ["a"]}, "data.input": Path("x")})
    assert (config.training.seed, config.wandb.tags, config.data.input) == (7, ("a",), "x")


def test_a_lists_flag_is_yaml_and_every_other_flag_is_taken_as_it_is(load: Loader) -> None:
    assert load("wandb:", **flag("training.betas", "[0.8, 0.9]"), preset=None).training.betas == (0.8, 0.9)
    assert load("wandb:", **flag("data.input", "a: [b #c")).data.input == "a: [b #c"


def test_a_mixture_is_a_mapping_in_a_file_and_in_a_flag_and_comes_back(load: Loader, tmp_path: Path) -> None:
    text = "data:\n  mixture:\n    web: [0.9, 0.5]\n    code: [0.1, 0.5]\n  stages: [3 tokens]\n"
    config = load(text)
    assert config.data.mixture == {"web": (0.9, 0.5), "code": (0.1, 0.5)} and config.stage_steps == [0, 1]
    given = {"mixture": "{web: [0.9, 0.5], code: [0.1, 0.5]}", "stages": "[3 tokens]"}
    flags = {f"data.{name}": (f"--data.{name}", value) for name, value in given.items()}
    assert load("data:", flags=flags).data.mixture == config.data.mixture
    assert load(effective_config_yaml(config, {})).data == config.data
    assert Config.model_validate_json(config.model_dump_json()).data == config.data


def test_every_value_has_its_origin(load: Loader) -> None:
    load("model:\n  max_position_embeddings: 64\n  flash_attention: false\n")
    flags = {"training.train_steps": ("--train_steps", "7")}
    _, origins = load_config_with_origins(flags=flags, training={"seed": 3})
    assert origins.keys() == FIELDS.keys()
    assert origins["model.max_position_embeddings"] == "config.yaml:2"
    assert origins["training.attention"] == "config.yaml:3"
    assert origins["training.train_steps"] == "--train_steps"
    assert origins["training.seed"] == "argument training.seed"
    assert origins["training.sequence_length"] == "from model.max_position_embeddings"
    assert origins["training.eps"] == "default"


def test_a_presets_values_name_the_preset_and_the_line() -> None:
    _, origins = load_config_with_origins(preset="nano")
    assert re.fullmatch(r"preset nano:\d+", origins["model.hidden_size"])


# What is refused

MISTAKES = {
    "training:\n  learnin_rate: 1e-4": "2: training.learnin_rate: unknown key. Did you mean training.learning_rate?",
    "training:\n  lr: 1e-4": "2: training.lr: unknown key. Did you mean training.learning_rate?",
    "training:\n  max_iters: 9": "2: training.max_iters: unknown key. Did you mean training.train_steps?",
    "training:\n  num_epochs: 3": "2: training.num_epochs: unknown key. The length of a run is set in steps; use training.train_steps.",
    "model:\n  n_layer: 4": "2: model.n_layer: unknown key. Did you mean model.num_hidden_layers?",
    "model:\n  dropout: 0.1": "2: model.dropout: unknown key. SmolLM2 has no dropout; remove it.",
    "model:\n  batch_size: 4": "2: model.batch_size: unknown key. Did you mean training.batch_size?",
    "model:\n  zzz: 4": "2: model.zzz: unknown key. See docs/config.md, or remove the line.",
    "learning_rate: 1e-4": "1: learning_rate: is not inside a section. Did you mean training.learning_rate?",
    "training.seed: 4": "1: training.seed: is not inside a section. Write `seed:` indented under `training:`.",
    "trainning:\n  seed: 1": "1: trainning: unknown section. Did you mean training?",
    "optimizer:\n  lr: 1": "1: optimizer: is not inside a section. Did you mean training.optimizer?",
    "training:\n  train_steps: many": "2: training.train_steps: must be a whole number from 1 to 1,000,000,000 (got 'many')",
    "training:\n  train_steps: 1.5": "2: training.train_steps: must be a whole number from 1 to 1,000,000,000 (got 1.5)",
    "training:\n  train_steps: 0": "2: training.train_steps: must be a whole number from 1 to 1,000,000,000 (got 0)",
    "training:\n  learning_rate: .nan": "2: training.learning_rate: must be a number above 0 and at most 10 (got '.nan')",
    "training:\n  learning_rate: 1e999": "2: training.learning_rate: must be a number above 0 and at most 10 (got 1e999)",
    "training:\n  learning_rate: -1": "2: training.learning_rate: must be a number above 0 and at most 10 (got -1)",
    "training:\n  learning_rate: 1,5": "2: training.learning_rate: must be a number above 0 and at most 10 (got '1,5')",
    "training:\n  optimizer: adamW": "2: training.optimizer: must be adamw or muon (got 'adamW')",
    "training:\n  schedule: WSD": "2: training.schedule: must be cosine, linear or wsd (got 'WSD')",
    "training:\n  compile: maybe": "2: training.compile: must be auto, true or false (got 'maybe')",
    "training:\n  betas: 0.9": "2: training.betas: must be two numbers from 0 to below 1, as [0.9, 0.95] (got 0.9)",
    "training:\n  betas: [0.9]": "2: training.betas: must be two numbers from 0 to below 1, as [0.9, 0.95] (got [0.9])",
    "training:\n  save_dir:": "2: training.save_dir: must be a path (got nothing)",
    "training:\n  save_dir: [a]": "2: training.save_dir: must be a path (got [a])",
    "training:\n  seed: {a: 1}": "2: training.seed: must be a whole number from 0 to 9,223,372,036,854,775,807 (got a section)",
    "model:\n  head_dim: 33": "2: model.head_dim: must be a whole number from 2 to 1,024, a multiple of 2 (got 33)",
    "model:\n  norm: |\n    a\n    b": "2: model.norm: must be rmsnorm or layernorm (got 'a\\nb')",
    "training:\n  time_limit: 2 hours": "2: training.time_limit: must be seconds above 0, or a duration such as 90m, 2h or 1-12:00:00, "
    "or null (got '2 hours')",
    "training:\n  time_limit: 1:30": "2: training.time_limit: must be seconds above 0, or a duration such as 90m, 2h or 1-12:00:00, "
    "or null (got '1:30')",
    "training:\n  save_dir: /": "2: training.save_dir: must be a path (got '/')",
    "data:\n  input: ~nobody-of-this-name/a.txt": "2: data.input: must be a path, a pattern, a hub name or `-` (got '~nobody-of-this-name/a.txt')",
    'training:\n  sample_prompts: ["\\ud800"]': "2: training.sample_prompts: must be a list of texts, as [a, b], at most 64 long "
    "(got '[\\ud800]')",
    "training:\n  seed: 1\n  seed: 2": "3: training.seed: is already set on line 2. Keep one of the two.",
    "training:\n  seed: 1\nmodel:\ntraining:\n  seed: 2": "4: training: is already set on line 1. Keep one of the two.",
    "training: 5": "1: training: 5 is not a section. Indent its keys under `training:`.",
    "training:\nseed: 5": "2: seed: is not inside a section. Did you mean training.seed?",
    "training:\n  ? [a]\n  : 1": "2: [a] is not a valid key. Use a plain word.",
    "- training": "1: [training] is not a section. A config has the sections model, training, data and wandb.",
    "training": "1: 'training' is not a section. A config has the sections model, training, data and wandb.",
    "training:\n  seed: 1\n model: 2": "3: not valid YAML (expected <block end>, but found '<block mapping start>'). Check its colons, "
    "indentation and quotes.",
    "training:\n\tseed: 1": "2: not valid YAML (found character '\\t' that cannot start any token). Check its colons, indentation and quotes.",
    'data:\n  input: "a': "2: not valid YAML (found unexpected end of stream). Check its colons, indentation and quotes.",
    "a: 1\n---\nb: 1": "2: not valid YAML (but found another document). Check its colons, indentation and quotes.",
    "training:\n  seed: \x01": "2: contains the character '\\x01'. Remove it.",
    'data:\n  input: "\\U99999999"': "1: not valid YAML (an escape sequence stands for no character). Write the character itself.",
    'data:\n  input: "\\ud800"': "2: data.input: must be a path, a pattern, a hub name or `-` (got '\\ud800')",
    'data:\n  input: "a\\0b"': "2: data.input: must be a path, a pattern, a hub name or `-` (got 'a\\x00b')",
    "training: &a\n  seed: 1": "1: anchors and aliases (& and *) are not supported. Write out the value.",
    "training:\n  seed: *a": "2: anchors and aliases (& and *) are not supported. Write out the value.",
    "training:\n  seed: !!python/object/apply:os.system [id]": "2: tags (tag:yaml.org,2002:python/object/apply:os.system) are not supported. Write the plain "
    "value.",
    "training:\n  seed: !!int 3": "2: tags (tag:yaml.org,2002:int) are not supported. Write the plain value.",
    "a: " + "[" * 50_000: "1: is nested too deeply. A config has only sections and keys.",
    "model:\n  flash_attention: 3": "2: model.flash_attention: must be true or false (got 3)",
    "model:\n  flash_attention: true\ntraining:\n  attention: eager": "2: model.flash_attention: true sets training.attention to auto, "
    "but config.yaml:4 sets it to eager. Keep one of the two.",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_is_reported_with_its_line_and_advice(load: Loader, text: str, message: str) -> None:
    assert refusal(load, text) == f"config.yaml:{message}"


@pytest.mark.parametrize("text", ["", "  \n", "# nothing\n", "---\n", "~"])
def test_an_empty_file_is_reported_as_empty(load: Loader, text: str) -> None:
    message = "config.yaml: the file is empty. Add sections and keys to it, or use --preset nano."
    assert refusal(load, text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\nmodel: {hidden_size: 100}", "config.yaml:3: model.num_attention_heads: must be a divisor of model.hidden_size = 100 (got 12). "
         "Change model.num_attention_heads or model.hidden_size."),
        ("model: {num_key_value_heads: 5}", "config.yaml:1: model.num_key_value_heads: must be a divisor of model.num_attention_heads = 12 "
         "(got 5). Use a divisor of model.num_attention_heads."),
    ],
)  # fmt: skip
def test_a_contradiction_has_the_line_of_one_of_its_keys(load: Loader, text: str, message: str) -> None:
    assert refusal(load, text) == message


def test_a_contradiction_that_a_flag_made_names_the_flag(load: Loader) -> None:
    message = refusal(load, "wandb:", **flag("training.sequence_length", "4096"))
    assert message.startswith(
        "--training.sequence_length: is greater than model.max_position_embeddings = 2048 (got 4096)"
    )


def test_all_problems_come_at_once_in_the_order_of_their_lines(load: Loader) -> None:
    text = "training:\n  learning_rate: 0\n  sed: 1\nmodel:\n  norm: x\n  norm: y\n"
    flags = {"training.seed": ("--training.seed", "x"), "training.train_steps": ("--train_steps", "0")}
    lines = refusal(load, text, flags=flags, data={"inputt": "x"}).splitlines()
    assert [line.split(" ")[:3] for line in lines] == [
        ["config.yaml:2:", "training.learning_rate:", "must"],
        ["config.yaml:3:", "training.sed:", "unknown"],
        ["config.yaml:5:", "model.norm:", "must"],
        ["config.yaml:6:", "model.norm:", "is"],
        ["argument", "data.inputt:", "unknown"],
        ["--train_steps:", "must", "be"],
        ["--training.seed:", "must", "be"],
    ]


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("training.betas", "[0.9", "--training.betas: not valid YAML (expected ',' or ']', but got '<stream end>'). Check its colons, "
         "indentation and quotes."),
        ("training.betas", "0.9", "--training.betas: must be two numbers from 0 to below 1, as [0.9, 0.95] (got 0.9)"),
        ("data.input", "", "--data.input: must be a path, a pattern, a hub name or `-` (got nothing)"),
        ("data.input", os.fsdecode(b"\xff.txt"), "--data.input: must be a path, a pattern, a hub name or `-` (got '\\udcff.txt')"),
        ("data.mixture", "{a: x}", "--data.mixture: must be inputs with their weights, as {web: 0.9, code: [0.1, 0.3]} (got a section)"),
        ("data.mixture", "{a: 0.5, a: 0.5}", "--data.mixture: must be inputs with their weights, as {web: 0.9, code: [0.1, 0.3]} (got a section)"),
        ("data.stages", "[soon]", "--data.stages: must be a list of steps or tokens, as [3000, 6e9 tokens] (got [soon])"),
        ("training.lr", "1", "--training.lr: unknown key. Did you mean training.learning_rate?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_flag_names_the_flag(load: Loader, key: str, text: str, message: str) -> None:
    assert refusal(load, "wandb:", **flag(key, text)) == message


def test_a_wrong_argument_is_named(load: Loader) -> None:
    message = "argument training.seed: must be a whole number from 0 to 9,223,372,036,854,775,807 (got 'x')"
    assert refusal(load, "wandb:", training={"seed": "x"}) == message


def test_an_absent_config_names_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^config\.yaml: no such file\. .*--preset nano\.$"):
        load_config()


def make_folder(path: Path) -> None:
    path.mkdir()


def make_utf16(path: Path) -> None:
    path.write_text("training:\n", encoding="utf-16")


def make_latin1(path: Path) -> None:
    path.write_bytes(b"training:\n  # \xe9\n")


def make_huge(path: Path) -> None:
    path.write_bytes(b"#" * 2**17)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_folder, ": cannot be read ("),
        (make_utf16, ":1: byte 0 is not valid UTF-8. Save the file as UTF-8."),
        (make_latin1, ":2: byte 14 is not valid UTF-8. Save the file as UTF-8."),
        (make_huge, ": is larger than 64 KB. Choose a config file with --config."),
    ],
)
def test_a_file_that_is_no_config_gets_one_line(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / "x.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'x.yaml'}{words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000])
def test_an_impossible_path_gets_one_line(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("nanoo", "Did you mean nano?"),
        (
            "../config",
            "Use one of chat-1.7b, chat-135m, chat-360m, continue-135m, micro, nano, smollm2-1.7b, smollm2-135m, smollm2-360m.",
        ),
    ],
)
def test_for_an_unknown_preset_the_known_ones_are_listed(preset: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(preset=preset)
    assert str(caught.value) == f"--preset: unknown preset '{preset}'. {words}"


def test_a_preset_and_a_config_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"^--preset nano: cannot be combined with --config config\.yaml\."):
        load_config("config.yaml", preset="nano")


# Any document: a config, or a list of one-line problems (D1)

SCALARS = [
    "", "~", "1", "-1", "0", "1e-4", "1e999", ".nan", "010", "0x10", "1_0", "12:30", "yes", "no", "true", "null", "adamw",
    "muon", "bf16", "x", '"\\f"', '"\\ud800"', '"\\0"', "'", '"', "*a", "&a 1", "!!int 1", "!!python/name:os.system x",
    "[1, 2]", "[0.9, 0.95]", "[[[1]]]", "{a: 1}", "{", "]", "|\n  x", "- 1", "# c", "? a", "%", "@", "\t", "\ud7ff", "é", "\x85",
    "9" * 400, "<<: 1", "2026-11-24", "1.", ".", "+", "e5", "--- ", "...",
]  # fmt: skip
NAMES = st.sampled_from(
    [*(key.rpartition(".")[2] for key in KEYS), *SECTIONS, "lr", "x", "", "?", "<<", "1", "training.seed"]
)
LINES = st.tuples(
    st.sampled_from(["", " ", "  ", "    ", "\t"]), NAMES, st.sampled_from([":", ": ", " "]), st.sampled_from(SCALARS)
)


def section_texts(section: str) -> st.SearchStrategy[str]:
    """A section with some of its keys, most of them at their defaults."""
    defaults = {key.split(".")[1]: to_yaml(value_of(Config(), key)) for key in FIELDS if key.startswith(f"{section}.")}
    values = {
        name: st.one_of(st.just(text), st.just(text), st.sampled_from(SCALARS)) for name, text in defaults.items()
    }
    keys = st.sampled_from(list(defaults)).flatmap(lambda name: st.tuples(st.just(name), values[name]))
    lines = st.lists(keys, max_size=4, unique_by=lambda key: key[0])
    return lines.map(lambda some: f"{section}:\n" + "".join(f"  {name}: {value}\n" for name, value in some))


VALID = [path.read_text(encoding="utf-8") for path in SHIPPED]


@st.composite
def damaged_configs(draw: st.DrawFn) -> str:
    """A shipped config with a piece replaced."""
    lines = draw(st.sampled_from(VALID)).splitlines(keepends=True)
    start = draw(st.integers(0, len(lines) - 1))
    text = "".join(lines[start : start + 12])
    at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 9))
    return text[:at] + draw(st.sampled_from(SCALARS)) + text[at + length :]


DOCUMENTS = st.one_of(
    st.sets(st.sampled_from(list(SECTIONS)), min_size=1, max_size=2).flatmap(
        lambda sections: st.tuples(*map(section_texts, sorted(sections))).map("".join)
    ),
    st.lists(LINES.map("".join), max_size=8).map("\n".join),
    damaged_configs(),
    st.text(max_size=40),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def try_documents(folder: Path, count: int) -> None:
    limits = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    limits(given(text=DOCUMENTS)(check_document))(folder=folder)


def test_any_document_is_a_config_or_a_list_of_one_line_problems(folder: Path) -> None:
    try_documents(folder, 400)


@pytest.mark.slow
def test_so_are_thousands_of_documents(folder: Path) -> None:
    try_documents(folder, 3000)


def check_document(folder: Path, text: str) -> None:
    path = folder / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    problem = None
    try:
        config = load_config(path)
    except ConfigError as error:
        problem = str(error)
    else:
        assert Config.model_validate(config.model_dump()) == config
    if problem is not None:
        where = rf"{re.escape(str(path))}(:\d+)?: ."
        assert all(line.isprintable() and re.match(where, line) for line in problem.split("\n"))
    assert [entry.name for entry in folder.iterdir()] == ["fuzz.yaml"]


# The effective config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_effective_config_loads_to_the_same_config(path: Path, load: Loader) -> None:
    config, origins = load_config_with_origins(path)
    assert load(effective_config_yaml(config, origins)) == config


NASTY = ["", 'it\'s "so"', "a: b # c", "\f\t\n\r\0", "\x85\u2028\ufeff\x7f", "😀 é", "null", "*a", "[x]", "\\f", "%"]


def test_any_text_survives_the_effective_config(load: Loader) -> None:
    config = Config.model_validate({"training": {"sample_prompts": NASTY, "eps": 1e-300}, "wandb": {"name": "no"}})
    assert load(effective_config_yaml(config, {})) == config


@pytest.mark.parametrize("value", [*NASTY, 1e-4, 1e-8, 1e22, 0.1, 12, True, None])
def test_other_yaml_readers_give_our_values_the_same_types(value: object) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


def test_each_value_of_the_effective_config_has_its_origin(load: Loader) -> None:
    load("training:\n  learning_rate: 1e-4\n")
    text = effective_config_yaml(*load_config_with_origins())
    assert "  learning_rate: 0.0001  # config.yaml:2\n" in text
    assert text.count("  # ") == len(FIELDS)


# The command line


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return parser.parse_args(argv)


def test_only_the_flags_that_were_given_are_read() -> None:
    given = parse("--training.learning_rate", "3e-4", "--model.flash_attention=false", "--data.input", "-")
    assert read_config_flags(given) == {
        "training.learning_rate": ("--training.learning_rate", "3e-4"),
        "data.input": ("--data.input", "-"),
        "model.flash_attention": ("--model.flash_attention", "false"),
    }


@pytest.mark.parametrize("key", KEYS)
def test_help_shows_each_key_with_its_sentence_and_default(key: str) -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    text = " ".join(parser.format_help().split())
    assert f"--{key} VALUE" in text
    if key in FIELDS:
        sentence = " ".join((FIELDS[key].description or "").split())
        assert sentence.replace("-", "") in text.replace("- ", "").replace("-", "")


# A resume

REFUSED = re.findall(
    r"\S+",
    """
    model.vocab_size model.hidden_size model.intermediate_size model.num_hidden_layers model.num_attention_heads
    model.num_key_value_heads model.head_dim model.max_position_embeddings model.rope_theta model.rope_scaling model.init_from
    data.train_on data.chat_template data.add_tokens model.norm model.norm_eps
    model.initializer_range model.tie_word_embeddings training.sequence_length training.optimizer training.decay
    training.seed data.tokenizer data.validation_fraction data.validation_input data.stride data.pack data.document_separator
    data.document_mask
    training.batch_size training.gradient_accumulation_steps
""",
)
NOTED = re.findall(
    r"\S+",
    """
    training.train_steps training.learning_rate training.min_learning_rate training.warmup_steps training.schedule
    training.decay_steps training.weight_decay training.betas training.eps training.max_grad_norm training.z_loss training.on_spike
    training.deterministic training.precision training.attention training.gradient_checkpointing training.compile data.input
    data.include data.exclude data.text_field data.on_bad_line data.mixture data.stages
""",
)
FREE = re.findall(
    r"\S+",
    """
    training.on_nonfinite training.log_interval training.eval_interval training.eval_windows training.save_interval
    training.sample_interval training.sample_prompts training.sample_tokens training.save_dir training.keep_last
    training.time_limit training.diagnostics_interval training.rank_timeout training.sharding training.checkpoints
    training.keep_every data.cache_dir wandb.enabled wandb.mode wandb.project
    wandb.entity wandb.name wandb.tags wandb.log_checkpoints wandb.log_gradients wandb.log_code wandb.landscape_interval
    training.tensorboard training.preflight data.regression_input
""",
)


def test_the_three_lists_hold_every_key_once() -> None:
    assert sorted(REFUSED + NOTED + FREE) == sorted(FIELDS)


def with_values(config: Config, **values: object) -> Config:
    """The config with dotted keys replaced, unchecked."""
    for key, value in values.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


@pytest.mark.parametrize("key", FIELDS)
def test_each_key_has_its_rule_on_a_resume(key: str) -> None:
    old = value_of(Config(), key)
    rule: Resume = "refused" if key in REFUSED else "noted" if key in NOTED else "free"
    new = old + 1 if isinstance(old, int) else ("another", old)
    assert changed_on_resume(Config(), with_values(Config(), **{key: new})) == [Change(key, old, new, rule)]


def test_the_same_config_has_no_changes() -> None:
    assert changed_on_resume(Config(), Config()) == []


def test_another_cut_of_the_same_global_batch_is_noted() -> None:
    new = with_values(Config(), **{"training.batch_size": 6, "training.gradient_accumulation_steps": 8})
    assert [change.rule for change in changed_on_resume(Config(), new)] == ["noted", "noted"]


# The files that are shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_leaves_head_dim_out(path: Path) -> None:
    assert load_config(path).model.head_dim >= 32
    assert "head_dim" not in path.read_text(encoding="utf-8")


def test_the_presets_are_the_files_in_configs() -> None:
    assert list_presets() == {path.stem: path for path in SHIPPED[1:]}


USERS_VALUES = {
    "model.vocab_size": "32000",
    "model.hidden_size": "768",
    "model.num_hidden_layers": "12",
    "model.num_attention_heads": "12",
    "model.num_key_value_heads": "12",
    "model.intermediate_size": "3072",
    "model.max_position_embeddings": "2048",
    "model.norm": "layernorm",
    "model.tie_word_embeddings": "true",
    "model.flash_attention": "true",
    "model.gradient_checkpointing": "true",
    "training.learning_rate": "1e-4",
    "training.weight_decay": "0.01",
    "training.max_grad_norm": "1.0",
    "training.batch_size": "12",
    "training.gradient_accumulation_steps": "4",
    "training.warmup_steps": "100",
    "training.schedule": "cosine",
    "training.train_steps": "5000",
    "training.eval_interval": "100",
    "training.save_interval": "500",
    "training.sample_interval": "200",
    "wandb.enabled": "true",
}


def test_config_yaml_holds_the_users_sections_and_values_as_they_were_written() -> None:
    root = yaml.compose((ROOT / "config.yaml").read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    assert root is not None
    texts = {f"{s.value}.{k.value}": getattr(v, "value", "") for s, section in root.value for k, v in section.value}
    assert [section.value for section, _ in root.value] == ["model", "training", "wandb", "data"]
    assert {key: texts.get(key) for key in USERS_VALUES} == USERS_VALUES


def test_config_yaml_has_a_comment_for_each_key() -> None:
    lines = (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"\s*\w+:", line) and " # " not in line] == []


def test_config_yaml_differs_from_the_defaults_in_two_keys_only() -> None:
    assert [change.key for change in changed_on_resume(Config(), load_config(ROOT / "config.yaml"))] == [
        "training.gradient_checkpointing",
        "wandb.enabled",
    ]


@pytest.mark.parametrize(
    ("preset", "sequences", "rate", "steps", "decay", "std"),
    [
        ("smollm2-135m", 512, 3e-3, 2_000_000, 400_000, 1 / 24),
        ("smollm2-360m", 768, 3e-3, 2_600_000, 520_000, 960**-0.5),
        ("smollm2-1.7b", 1024, 5e-4, 5_240_000, 524_000, 0.02),
    ],
)
def test_smollm2_presets_hold_the_published_hyperparameters(
    preset: str, sequences: int, rate: float, steps: int, decay: int, std: float
) -> None:
    config = load_config(preset=preset)
    t, m = config.training, config.model
    assert (config.global_batch_size, t.learning_rate, t.train_steps, t.decay_steps) == (sequences, rate, steps, decay)
    assert (t.schedule, t.warmup_steps, t.optimizer, t.decay, t.weight_decay) == ("wsd", 2000, "adamw", "all", 0.01)
    assert (t.betas, t.eps, t.max_grad_norm, t.min_learning_rate, t.z_loss) == ((0.9, 0.95), 1e-8, 1.0, 0.0, 0.0)
    assert (m.rope_theta, m.max_position_embeddings, m.norm, m.norm_eps, m.head_dim) == (1e4, 2048, "rmsnorm", 1e-5, 64)
    assert m.initializer_range == pytest.approx(std, rel=1e-12)


def test_nano_and_micro_have_the_documented_sizes() -> None:
    nano, micro = load_config(preset="nano"), load_config(preset="micro")
    assert 1e6 <= count_parameters(nano.model) <= 2e6
    assert 10e6 <= count_parameters(micro.model) <= 12e6
    assert (nano.training.sequence_length, micro.training.sequence_length) == (128, 256)
    assert nano.model.vocab_size <= 4096
    for config in (nano, micro):
        t = config.training
        assert t.train_steps >= 50 * t.log_interval
        assert 2 <= t.train_steps / t.save_interval <= 4
        assert not config.wandb.enabled
        assert config.data.document_separator == "\f"


@pytest.mark.parametrize(
    ("name", "function"), [("config.md", "render_markdown"), ("config.schema.json", "render_schema")]
)
def test_the_generated_docs_are_current(name: str, function: str) -> None:
    """If this fails: python scripts/write_config_docs.py."""
    render = runpy.run_path(str(ROOT / "scripts" / "write_config_docs.py"))[function]
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == render()


def test_the_schema_knows_every_key_and_alias() -> None:
    schema = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    known = [f"{name}.{key}" for name, kind in SECTIONS.items() for key in schema["$defs"][kind.__name__]["properties"]]
    assert sorted(known) == sorted(KEYS)
