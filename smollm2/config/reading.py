"""Config files and flags to a Config: every problem at once, each with its line, every value with its origin.

Defaults, then the file or the preset, then flags, then keyword arguments. A value is typed by its key, from the text as
it was written: YAML 1.1 would read `1e-4` as text, `no` as false and `010` as 8. Anchors, aliases and tags are refused,
so that a file says what it says and can run nothing.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError

from smollm2.config.schema import ALIASES, SECTIONS, Config, Resume, contradictions
from smollm2.errors import ConfigError

LARGEST_FILE = 2**16
DEEPEST_NESTING = 8
FIELDS = {f"{name}.{key}": field for name, section in SECTIONS.items() for key, field in section.model_fields.items()}
KEYS = [*FIELDS, *ALIASES]
NUMBER = re.compile(r"[+-]?[0-9]*(?:_[0-9]+)*\.?[0-9]*(?:[eE][+-]?[0-9]+)?")
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
BOUNDS = {
    "gt": "above {}",
    "ge": "at least {}",
    "lt": "below {}",
    "le": "at most {}",
    "multiple_of": "a multiple of {}",
    "min_length": "not empty",
    "max_length": "at most {} long",
    "pattern": "without a NUL character",
}

DERIVED = {
    "model.num_key_value_heads": "model.num_attention_heads",
    "model.head_dim": "model.hidden_size / model.num_attention_heads",
    "training.sequence_length": "model.max_position_embeddings",
    "training.decay_steps": "training.train_steps / 5",
    "data.stride": "training.sequence_length",
    "data.cache_dir": "training.save_dir",
}
"""Keys whose default another key decides."""

OTHER_WORDS = {
    "training.learning_rate": "lr max_lr peak_lr step_size",
    "training.min_learning_rate": "min_lr end_lr",
    "training.train_steps": "steps max_steps max_iters num_steps total_steps iterations",
    "training.batch_size": "micro_batch_size per_device_train_batch_size device_batch_size bs",
    "training.gradient_accumulation_steps": "grad_accum accumulation_steps accumulation grad_accumulation",
    "training.sequence_length": "block_size seq_len seq_length max_length max_seq_len context_length context",
    "training.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio",
    "training.schedule": "scheduler lr_scheduler lr_scheduler_type lr_decay_style",
    "training.decay_steps": "decay_iters lr_decay_iters cooldown",
    "training.weight_decay": "wd",
    "training.betas": "beta1 beta2 beta_1 beta_2 adam_beta1 adam_beta2",
    "training.eps": "epsilon adam_eps adam_epsilon",
    "training.max_grad_norm": "grad_clip clip_grad gradient_clipping clip",
    "training.attention": "attn attention_backend attn_implementation",
    "training.precision": "dtype mixed_precision torch_dtype fp16 bf16 amp",
    "training.log_interval": "log_every logging_steps",
    "training.eval_interval": "eval_every eval_steps",
    "training.save_interval": "save_every save_steps checkpoint_interval checkpoint_every",
    "training.sample_interval": "sample_every",
    "training.save_dir": "out_dir output_dir checkpoint_dir run_dir",
    "training.keep_last": "save_total_limit total_limit",
    "model.num_hidden_layers": "n_layer n_layers num_layers layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_heads n_kv_head num_kv_heads kv_heads",
    "model.hidden_size": "n_embd d_model dim hidden_dim embed_dim width",
    "model.intermediate_size": "ffn_dim d_ff mlp_dim ffn_hidden_size",
    "model.max_position_embeddings": "max_positions n_positions n_ctx",
    "model.tie_word_embeddings": "tie_weights tied weight_tying tie_embeddings",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.rope_theta": "theta rope_base",
    "model.norm": "normalization norm_type",
    "model.initializer_range": "init_std",
    "model.flash_attention": "flash_attn use_flash_attention flash",
    "data.input": "input_file dataset train_file data_path path text",
    "data.validation_fraction": "val_fraction val_split valid_fraction test_size",
    "data.document_separator": "separator delimiter",
    "data.document_mask": "doc_mask document_masking intra_document_masking mask_documents block_diagonal",
    "wandb.project": "project_name wandb_project",
    "wandb.name": "run_name wandb_name",
    "wandb.enabled": "use_wandb wandb_log",
}
"""What other projects call our keys, so that a newcomer is told the name here."""


@dataclass(frozen=True)
class Given:
    """One value: as read, as it was written, and where."""

    value: Any
    text: str
    origin: str


class Change(NamedTuple):
    """A key that differs between a checkpoint's config and the one that goes on, and what becomes of it."""

    key: str
    old: object
    new: object
    rule: Resume


Level = dict[str, Given]


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, tuple[str, str]] | None = None,
    **overrides: Any,
) -> Config:
    """The config of a file (default: ./config.yaml) or of a preset, with flags and overrides on top.

    Overrides are sections or dotted keys: `load_config("config.yaml", training={"train_steps": 5})` or
    `load_config(preset="nano", **{"training.seed": 1})`. Raises ConfigError, one line for each problem.
    """
    return load_config_with_origins(path, preset=preset, flags=flags, **overrides)[0]


def load_config_with_origins(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, tuple[str, str]] | None = None,
    **overrides: Any,
) -> tuple[Config, dict[str, str]]:
    """The config, and for each dotted key where its value came from: `config.yaml:14`, `--train_steps`, `default`.

    `flags`: dotted key -> (flag as typed, text).
    """
    problems: list[str] = []
    name, text = _read_source(path, preset)
    given: Level = {}
    for level in (
        _read_file(name, text, problems),
        _read_flags(flags or {}, problems),
        _read_overrides(overrides, problems),
    ):
        given |= _settle_aliases(level, problems)
    config = _validate(given, name, problems)
    if problems or config is None:
        raise ConfigError("\n".join(sorted(problems, key=lambda problem: _line_of(problem, name))))
    return config, {
        key: given[key].origin if key in given else f"from {DERIVED[key]}" if key in DERIVED else "default"
        for key in FIELDS
    }


def list_presets() -> dict[str, Path]:
    """The configs that come along, by name: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((place for place in (package / "configs", package.parent / "configs") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag `--section.key` for each key, with its sentence, what it takes and its default."""
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(f"{name}: {(section.__doc__ or '').strip()}")
        for key in (key for key in KEYS if key.startswith(f"{name}.")):
            text = f"{describe_key(key)} ({describe_kind(key)}; default: {describe_default(key)})"
            group.add_argument(f"--{key}", metavar="VALUE", dest=key, help=text.replace("%", "%%"))


def read_config_flags(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The flags of `add_config_flags` that were given: dotted key -> (flag, text)."""
    given = {key: getattr(args, key, None) for key in KEYS}
    return {key: (f"--{key}", text) for key, text in given.items() if text is not None}


def changed_on_resume(old: Config, new: Config) -> list[Change]:
    """The keys that differ, each with its rule; batch_size and gradient_accumulation_steps count as their product."""
    changes = []
    for key in FIELDS:
        section, name = key.split(".")
        before, after = (getattr(getattr(config, section), name) for config in (old, new))
        rule = SECTIONS[section].resume_rule(name)
        if name in ("batch_size", "gradient_accumulation_steps") and old.global_batch_size != new.global_batch_size:
            rule = "refused"
        if before != after:
            changes.append(Change(key, before, after, rule))
    return changes


def effective_config_yaml(config: Config, origins: Mapping[str, str]) -> str:
    """Every value, with its origin as a comment; a file that loads to the same config."""
    lines = ["# What this run was started with: every value, and where it came from."]
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for key in (key for key in FIELDS if key.startswith(f"{section}.")):
            name = key.split(".")[1]
            origin = f"  # {show(origins[key])}" if key in origins else ""
            lines.append(f"  {name}: {to_yaml(getattr(getattr(config, section), name))}{origin}")
    return "\n".join(lines) + "\n"


def describe_key(key: str) -> str:
    """Its sentence."""
    if key in ALIASES:
        target, values = ALIASES[key]
        return f"true and false set {target} to {to_yaml(values[True])} and {to_yaml(values[False])}."
    return FIELDS[key].description or ""


def describe_kind(key: str) -> str:
    """What it takes: `a number, above 0, at most 10`."""
    if key in ALIASES:
        return "true or false"
    kind, field = FIELDS[key].annotation, FIELDS[key]
    optional = isinstance(kind, UnionType)
    kind = get_args(kind)[0] if optional else kind
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if get_origin(kind) is tuple:
        noun = "a list of texts, as [a, b]" if get_args(kind)[0] is str else "a list of two numbers, as [0.9, 0.95]"
    elif kind in nouns:
        noun = nouns[kind]
    else:
        *some, last = get_args(kind)
        noun = f"{', '.join(some)} or {last}"
    bounds = [
        words.format(_show_bound(getattr(bound, name)))
        for bound in field.metadata
        for name, words in BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    return ", ".join([noun, *bounds]) + (", or null" if optional else "")


def _show_bound(bound: object) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" if isinstance(bound, float) else str(bound)


def describe_default(key: str) -> str:
    """Its default as YAML, or the key that decides it."""
    if key in ALIASES:
        return f"that of {ALIASES[key][0]}"
    return f"from {DERIVED[key]}" if key in DERIVED else to_yaml(FIELDS[key].default)


def suggest_key(key: str) -> str:
    """What to do about a key that does not exist: the name that was meant, as far as one can tell."""
    word = key.rpartition(".")[2].strip().lower().replace("-", "_")
    if word == "dropout":
        return "SmolLM2 has no dropout; take the line out"
    section = key.partition(".")[0]
    own_first = sorted(KEYS, key=lambda known: not known.startswith(f"{section}."))
    names = {name.rpartition(".")[2]: name for name in reversed(own_first)}
    foreign = {other: known for known, words in OTHER_WORDS.items() for other in words.split()}
    if "epochs" in word:
        return "length is counted in updates here; use training.train_steps"
    for table in (names, foreign):
        if word in table:
            return f"did you mean {table[word]}?"
    own = [name for name, known in names.items() if known.startswith(f"{section}.")]
    for words in (own, list(names), list(foreign)):
        near = get_close_matches(word, words, 1, 0.7)
        if near:
            return f"did you mean {({**foreign, **names})[near[0]]}?"
    return "docs/config.md lists the keys; take the line out if none is meant"


def show(text: object) -> str:
    """A value as part of a one-line message: no control characters, not long."""
    line = str(text)
    line = line if line.isprintable() and line.strip() else repr(line)
    return line if len(line) <= 80 else f"{line[:77]}..."


def to_yaml(value: object) -> str:
    """One value as YAML on one line, which any reader of YAML types as we do."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_yaml, value))}]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    # JSON, but with what does not print escaped in YAML's way: JSON's surrogate pairs are two characters to YAML.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))


def _read_source(path: str | Path | None, preset: str | None) -> tuple[str, str]:
    """The name by which messages call the source, and its text."""
    if preset is not None and path is not None:
        raise ConfigError(f"--preset {show(preset)} and --config {show(path)} name two configs; give one of them")
    if preset is not None:
        presets = list_presets()
        if preset not in presets:
            near = get_close_matches(preset, presets, 1)
            raise ConfigError(
                f"--preset {show(preset)}: unknown; {f'did you mean {near[0]}?' if near else 'give ' + ', '.join(presets)}"
            )
        return f"preset {preset}", _read_text(presets[preset], f"preset {preset}")
    name = show(path or "config.yaml")
    try:
        return name, _read_text(Path(path or "config.yaml"), name)
    except FileNotFoundError:
        raise ConfigError(
            f"{name}: no such file; name one with --config FILE, or take one that comes along: --preset nano"
        ) from None


def _read_text(path: Path, name: str) -> str:
    """Raises FileNotFoundError, and ConfigError for anything else that stands in the way."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: it cannot be read ({reason}); name a config file with --config") from None
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{name}: it is over {LARGEST_FILE // 1024} KB, no config; name a config file with --config")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of a YAML text; None where it is empty. `name` may end in `:`, to which the line is added."""

    def problem(sentence: str, line: int) -> ConfigError:
        return ConfigError(f"{name}{line if name.endswith(':') else ''}: {sentence}")

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            tag = getattr(event, "tag", None)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) is not None:
                raise problem("anchors and aliases (& and *) are not read; write the value out", line)
            if tag is not None:
                raise problem(f"tags ({show(tag)}) are not read; write the plain value", line)
            if depth > DEEPEST_NESTING:
                raise problem("it is nested too deeply; a config has sections and keys", line)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = show(error.problem or error.context)
        line = mark.line + 1 if mark else 1
        raise problem(f"not YAML ({why}); look at its colons, indentation and quotes", line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = text[error.position : error.position + 1]
        raise problem(f"it holds the character {character!r}; take it out", line) from None
    except (ValueError, OverflowError):  # an escape such as "\U99999999"
        raise problem("not YAML: an escape names no character; write the character", 1) from None


def _read_file(name: str, text: str, problems: list[str]) -> Level:
    """The values of a file, each under its dotted key."""
    root = _compose(text, f"{name}:")
    if root is None or _is_null(root):
        raise ConfigError(f"{name}: the file is empty; write sections and keys into it, or take --preset nano")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:1: {_show_node(root)} is no section; a config has {', '.join(SECTIONS)}")
    level: Level = {}
    for section, line, node in _pairs(root, "", name, problems):
        where = f"{name}:{line}: {show(section)}"
        if section in SECTIONS and isinstance(node, yaml.MappingNode):
            for key, key_line, value in _pairs(node, f"{section}.", name, problems):
                _add(level, f"{section}.{key}", value, f"{name}:{key_line}", problems)
        elif section in SECTIONS:
            if not _is_null(node):
                problems.append(f"{where}: {_show_node(node)} is no section; indent its keys under `{section}:`")
        elif isinstance(node, yaml.MappingNode) and section.rpartition(".")[2] not in _names():
            near = get_close_matches(section.lower(), SECTIONS, 1)
            advice = f"did you mean {near[0]}?" if near else f"a config has {', '.join(SECTIONS)}"
            problems.append(f"{where}: unknown section; {advice}")
        else:
            parent, _, key = section.rpartition(".")
            advice = f"write `{key}:` indented under `{parent}:`" if section in KEYS else suggest_key(section)
            problems.append(f"{where}: it stands under no section; {advice}")
    return level


def _names() -> set[str]:
    return {key.rpartition(".")[2] for key in KEYS}


def _pairs(
    mapping: yaml.MappingNode, prefix: str, name: str, problems: list[str]
) -> Iterator[tuple[str, int, yaml.Node]]:
    """(key, line, value) of a mapping; one that is there twice is a problem."""
    first_line: dict[str, int] = {}
    for key_node, value in mapping.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{name}:{line}: {_show_node(key_node)} is no name of a key; write a word")
        elif key_node.value in first_line:
            where = f"{name}:{line}: {show(prefix + key_node.value)}"
            problems.append(f"{where}: it is there already, in line {first_line[key_node.value]}; keep one")
        else:
            first_line[key_node.value] = line
            yield key_node.value, line, value


def _read_flags(flags: Mapping[str, tuple[str, str]], problems: list[str]) -> Level:
    """The values of flags; a list is written as in YAML, everything else as it is."""
    level: Level = {}
    for key, (flag, text) in flags.items():
        is_list = key in FIELDS and get_origin(FIELDS[key].annotation) is tuple
        try:
            node = _compose(text, flag) if is_list else None
        except ConfigError as error:
            problems.append(str(error))
        else:
            _add(level, key, node or yaml.ScalarNode("", text), flag, problems)
    return level


def _read_overrides(overrides: Mapping[str, Any], problems: list[str]) -> Level:
    """The values of keyword arguments: sections and dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        inside = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
        flat.update(inside)
    level: Level = {}
    for key, value in flat.items():
        if key not in KEYS:
            problems.append(f"argument {show(key)}: unknown key; {suggest_key(key)}")
        else:
            value = str(value) if isinstance(value, PurePath) else value
            level[key] = Given(value, show(value), f"argument {key}")
    return level


def _add(level: Level, key: str, node: yaml.Node, origin: str, problems: list[str]) -> None:
    """Type a node as its key asks and put it into `level`, or say why that cannot be."""
    where, text = _locate(show(key), origin), _show_node(node)
    if key not in KEYS:
        problems.append(f"{where}: unknown key; {suggest_key(key)}")
        return
    try:
        level[key] = Given(_read_value(node, FIELDS[key].annotation if key in FIELDS else bool), text, origin)
    except (ValueError, KeyError):
        empty = isinstance(node, yaml.ScalarNode) and _is_null(node)
        advice = f"give {describe_kind(key)}"
        problems.append(f"{where}: it has no value; {advice}" if empty else f"{where}: {text} will not do; {advice}")


def _read_value(node: yaml.Node, kind: Any) -> Any:
    """A node as `kind` reads its text. Raises ValueError or KeyError."""
    if isinstance(kind, UnionType):  # X | None
        return None if _is_null(node) else _read_value(node, get_args(kind)[0])
    if get_origin(kind) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError(kind)
        return [_read_value(item, get_args(kind)[0]) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise ValueError(kind)
    if kind is bool:
        return BOOLS[node.value.lower()]
    if kind in (int, float):
        return _read_number(node.value, kind)
    return node.value


def _read_number(text: str, kind: type[int] | type[float]) -> int | float:
    """`1e-4`, `5_000`, `010` as 10; a whole number may be written `1e5`. Raises ValueError."""
    if not NUMBER.fullmatch(text):
        raise ValueError(text)
    if kind is float or not text.lstrip("+-").replace("_", "").isdigit():
        number = float(text)
        if kind is float:
            return number
        if not number.is_integer() or abs(number) > 2**53:
            raise ValueError(text)
        return int(number)
    return int(text)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value.lower() in ("", "~", "null")


def _show_node(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return show(f"[{', '.join(map(_show_node, node.value))}]")
    return "a section" if isinstance(node, yaml.MappingNode) else show(node.value)


def _line_of(problem: str, name: str) -> float:
    """The line of the file that a problem names; those of flags come after all lines."""
    number = problem.removeprefix(f"{name}:").partition(":")[0]
    return int(number) if number.isdecimal() else float("inf")


def _locate(key: str, origin: str) -> str:
    """Where a problem is; a flag or an argument that spells the key out need not be followed by it."""
    return origin if key in origin else f"{origin}: {key}"


def _settle_aliases(level: Level, problems: list[str]) -> Level:
    """Put each alias's value under the key it stands for; the two may not be at odds."""
    settled = {key: given for key, given in level.items() if key in FIELDS}
    for alias, (target, values) in ALIASES.items():
        if alias not in level:
            continue
        given = level[alias]
        if not isinstance(given.value, bool):
            problems.append(f"{_locate(alias, given.origin)}: {given.text} will not do; give true or false")
            continue
        meant = Given(values[given.value], given.text, given.origin)
        other = settled.setdefault(target, meant)
        if other.value != meant.value:
            problems.append(
                f"{_locate(alias, given.origin)}: {given.text} means {target}: {meant.value}, but {other.origin} sets that "
                f"to {other.text}; keep one of the two"
            )
    return settled


def _validate(given: Level, name: str, problems: list[str]) -> Config | None:
    """The config, or None with what is wrong added to `problems`. Contradictions are looked for once all else is well."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, one in given.items():
        section, _, field = key.partition(".")
        sections[section][field] = one.value
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        wrong = [".".join(map(str, one["loc"][:2])) for one in error.errors(include_url=False)]
        # A default that follows a wrong key fails with it: only what somebody wrote is named, and once.
        for key in dict.fromkeys(key for key in wrong if key in given):
            where, text = _locate(key, given[key].origin), given[key].text
            problems.append(f"{where}: {text} will not do; give {describe_kind(key)}")
        return None
    if not problems:
        for key, sentence in contradictions(config):
            involved = [key, *re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.\w+", sentence)]
            origin = next((given[one].origin for one in involved if one in given), name)
            problems.append(f"{_locate(key, origin)}: {sentence}")
    return config
