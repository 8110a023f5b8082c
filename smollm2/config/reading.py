"""Turn config files and flags into a Config, and report all problems at once, each with its line number.

Precedence, lowest first: defaults, the file or preset, flags, keyword arguments; the origin of every value is recorded.
The type of a key decides how its value is parsed: YAML 1.1 would read `1e-4` as text, `no` as false and `010` as 8.
Anchors, aliases and tags are rejected, so a file cannot execute code.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError

from smollm2.config.data_section import INPUT
from smollm2.config.initial_model import follow_initial_model
from smollm2.config.schema import FIELDS, SECTIONS, Config
from smollm2.config.section import Resume
from smollm2.config.sources import read_source
from smollm2.config.values import Given, Level, Switch, locate
from smollm2.config.vocabulary import (
    ALIASES,
    DERIVED,
    KEYS,
    describe_default,
    describe_key,
    describe_kind,
    suggest_key,
    to_yaml,
)
from smollm2.config.yaml_nodes import compose, is_null, quote, show, show_node
from smollm2.errors import ConfigError, lay_out

SECTIONS_ADVICE = "a config has the sections model, training, data and wandb"
EFFECTIVE_HEADERS = (
    "# The config of this run: every value, and where it came from.",
    "# What this run was started with: every value, and where it came from.",
)
"""Possible first lines of a config written by a run, the current one first."""

BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Change(NamedTuple):
    """A key whose value differs between a checkpoint's config and the resumed run's config, and its resume rule."""

    key: str
    old: object
    new: object
    rule: Resume


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, tuple[str, str]] | None = None,
    **overrides: Any,
) -> Config:
    """Return the config from a file (default: ./config.yaml) or a preset, with flags and overrides applied on top.

    Overrides are whole sections or dotted keys: `load_config("config.yaml", training={"train_steps": 5})` or
    `load_config(preset="nano", **{"training.seed": 1})`. Raise ConfigError, with one line per problem.
    """
    return load_config_with_origins(path, preset=preset, flags=flags, **overrides)[0]


def load_config_with_origins(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, tuple[str, str]] | None = None,
    found: Sequence[str] = (),
    **overrides: Any,
) -> tuple[Config, dict[str, str]]:
    """Return the config, and the origin of each dotted key's value: `config.yaml:14`, `--train_steps`, `default`.

    `flags` maps dotted keys to (flag as typed, text). `found` lists command-line problems to report with the others.
    """
    problems = list(found)
    upper = [_read_flags(flags or {}, problems), _read_overrides(overrides, problems)]
    try:
        name, text = read_source(path, preset)
        levels = [_read_file(name, text, problems), *upper]
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from None
    given: Level = {}
    for level in levels:
        given |= _settle_aliases(level, problems)
    if not text.startswith(EFFECTIVE_HEADERS):  # a run's own config has the shape already
        given |= follow_initial_model(given, problems, load_config)
    config = _validate(given, name, problems)
    if config is None:
        raise ConfigError("\n".join(sorted(problems, key=lambda problem: _line_of(problem, name))))
    return config, {
        key: given[key].origin if key in given else f"from {DERIVED[key]}" if key in DERIVED else "default"
        for key in FIELDS
    }


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag `--section.key` for each key, with its description, accepted values and default."""
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name, section.__doc__)
        for key in (key for key in KEYS if key.startswith(f"{name}.")):
            text = f"{describe_key(key)} ({describe_kind(key)}; default: {describe_default(key)})"
            group.add_argument(f"--{key}", metavar="VALUE", dest=key, help=text.replace("%", "%%"))


def read_config_flags(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return the config flags that were given on the command line, as a mapping from dotted key to (flag, text)."""
    given = {key: getattr(args, key, None) for key in KEYS}
    return {key: (f"--{key}", text) for key, text in given.items() if text is not None}


def changed_on_resume(old: Config, new: Config) -> list[Change]:
    """Return the keys that differ. batch_size and gradient_accumulation_steps are refused if their product changes."""
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


def is_input_chosen(config: Config, origins: Mapping[str, str]) -> bool:
    """Return whether the user named the input: the default is replaced by a sample corpus if it is absent."""
    return config.data.inputs != (INPUT,) or origins.get("data.input", "default").startswith("--")


def effective_config_yaml(config: Config, origins: Mapping[str, str]) -> str:
    """Return the config as YAML with each value's origin as a comment; loading it gives the same config."""
    lines = [EFFECTIVE_HEADERS[0]]
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for key in (key for key in FIELDS if key.startswith(f"{section}.")):
            name = key.split(".")[1]
            origin = f"  # {show(origins[key])}" if key in origins else ""
            lines.append(f"  {name}: {to_yaml(getattr(getattr(config, section), name))}{origin}")
    return "\n".join(lines) + "\n"


def _read_file(name: str, text: str, problems: list[str]) -> Level:
    """Return the values in a file by dotted key."""
    root = compose(text, f"{name}:")
    if root is None or is_null(root):
        raise ConfigError(name, "the file is empty", "add sections and keys to it, or use --preset nano")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:1", f"{show_node(root)} is not a section", SECTIONS_ADVICE)
    level: Level = {}
    for section, line, node in _pairs(root, "", name, problems):
        where = f"{name}:{line}: {show(section)}"
        if section in SECTIONS and isinstance(node, yaml.MappingNode):
            for key, key_line, value in _pairs(node, f"{section}.", name, problems):
                _add(level, f"{section}.{key}", value, f"{name}:{key_line}", problems)
        elif section in SECTIONS:
            if not is_null(node):
                what = f"{show_node(node)} is not a section"
                problems.append(lay_out(where, what, f"indent its keys under `{section}:`"))
        elif isinstance(node, yaml.MappingNode) and section.rpartition(".")[2] not in _names():
            near = get_close_matches(section.lower(), SECTIONS, 1)
            advice = f"did you mean {near[0]}?" if near else SECTIONS_ADVICE
            problems.append(lay_out(where, "unknown section", advice))
        else:
            parent, _, key = section.rpartition(".")
            advice = f"write `{key}:` indented under `{parent}:`" if section in KEYS else suggest_key(section)
            problems.append(lay_out(where, "is not inside a section", advice))
    return level


def _names() -> set[str]:
    return {key.rpartition(".")[2] for key in KEYS}


def _pairs(
    mapping: yaml.MappingNode, prefix: str, name: str, problems: list[str]
) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield (key, line, value) for each entry of a mapping; report duplicate keys in `problems`."""
    first_line: dict[str, int] = {}
    for key_node, value in mapping.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            what = f"{show_node(key_node)} is not a valid key"
            problems.append(lay_out(f"{name}:{line}", what, "use a plain word"))
        elif key_node.value in first_line:
            where = f"{name}:{line}: {show(prefix + key_node.value)}"
            what = f"is already set on line {first_line[key_node.value]}"
            problems.append(lay_out(where, what, "keep one of the two"))
        else:
            first_line[key_node.value] = line
            yield key_node.value, line, value


def _read_flags(flags: Mapping[str, tuple[str, str]], problems: list[str]) -> Level:
    """Return the values of flags. Lists and mappings are parsed as YAML; everything else is used literally."""
    level: Level = {}
    for key, (flag, text) in flags.items():
        is_list = key in FIELDS and get_origin(FIELDS[key].annotation) in (tuple, dict)
        try:
            node = compose(text, flag) if is_list else None
        except ConfigError as error:
            problems.append(str(error))
        else:
            _add(level, key, node or yaml.ScalarNode("", text), flag, problems)
    return level


def _read_overrides(overrides: Mapping[str, Any], problems: list[str]) -> Level:
    """Return the values of keyword arguments, which are whole sections or dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        inside = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
        flat.update(inside)
    level: Level = {}
    for key, value in flat.items():
        if key not in KEYS:
            problems.append(lay_out(f"argument {show(key)}", "unknown key", suggest_key(key)))
        else:
            value = str(value) if isinstance(value, PurePath) else value
            level[key] = Given(value, quote(value), f"argument {key}")
    return level


def _add(level: Level, key: str, node: yaml.Node, origin: str, problems: list[str]) -> None:
    """Store the value of a node in `level`, or append a message to `problems` if it is invalid."""
    if key not in KEYS:
        problems.append(lay_out(locate(show(key), origin), "unknown key", suggest_key(key)))
        return
    text = "nothing" if is_null(node) else show_node(node)
    kind = FIELDS[key].annotation if key in FIELDS else bool
    try:
        level[key] = Given(_read_value(node, kind), text, origin)
    except (ValueError, KeyError):
        problems.append(_refuse_value(key, text, origin))


def _refuse_value(key: str, text: str, origin: str) -> str:
    return lay_out(locate(key, origin), f"must be {describe_kind(key)} (got {text})")


def _read_value(node: yaml.Node, kind: Any) -> Any:
    """Return the text of a node, or a list or a mapping of texts, for pydantic to parse as `kind`.

    Booleans and integers such as `1e5` are parsed here. Raise ValueError or KeyError if that fails.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_read_value(item, str) for item in node.value]
    if isinstance(node, yaml.MappingNode) and get_origin(kind) is dict:
        pairs = [(key.value, _read_value(value, str)) for key, value in node.value]
        if len(dict(pairs)) < len(pairs):
            raise ValueError(kind)
        return dict(pairs)
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(kind)
    if is_null(node):
        return None
    text: str = node.value
    if kind == Switch and text == "auto":
        return text
    if kind in (bool, Switch):
        return BOOLS[text.lower()]
    is_int = kind is int or (isinstance(kind, UnionType) and get_args(kind)[0] is int)
    if is_int and "e" in text.lower():
        number = float(text)
        if not number.is_integer() or abs(number) > 2**53:
            raise ValueError(text)
        return int(number)
    return text


def _line_of(problem: str, name: str) -> float:
    """Return the line number that a problem names, or infinity for problems with flags, which are listed last."""
    number = problem.removeprefix(f"{name}:").partition(":")[0]
    return int(number) if number.isdecimal() else float("inf")


def _settle_aliases(level: Level, problems: list[str]) -> Level:
    """Return the values with each alias replaced by the key that it sets; report conflicts in `problems`."""
    settled = {key: given for key, given in level.items() if key in FIELDS}
    for alias, (target, values) in ALIASES.items():
        if alias not in level:
            continue
        given = level[alias]
        if not isinstance(given.value, bool):
            problems.append(_refuse_value(alias, given.text, given.origin))
            continue
        meant = Given(values[given.value], given.text, given.origin)
        other = settled.setdefault(target, meant)
        if other.value != meant.value:
            mine, theirs = (to_yaml(value).strip('"') for value in (meant.value, other.value))
            what = f"{to_yaml(given.value)} sets {target} to {mine}, but {other.origin} sets it to {theirs}"
            problems.append(lay_out(locate(alias, given.origin), what, "keep one of the two"))
    return settled


def _validate(given: Level, name: str, problems: list[str]) -> Config | None:
    """Return the config, or None if there are problems. Report contradictions only if all values are valid."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, one in given.items():
        section, _, field = key.partition(".")
        sections[section][field] = one.value
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        details = error.errors(include_url=False)
    else:
        return None if problems else config
    wrong = [".".join(map(str, one["loc"][:2])) for one in details if one["type"] != "contradiction"]
    # A default that depends on an invalid key fails as well: report only keys that were set explicitly, each once.
    for key in dict.fromkeys(key for key in wrong if key in given):
        problems.append(_refuse_value(key, given[key].text, given[key].origin))
    if problems:
        return None
    for context in (one["ctx"] for one in details if one["type"] == "contradiction"):
        keys = context["keys"]
        origin = next((given[key].origin for key in keys if key in given), name)
        where = f"{origin}: {keys[0]}" if keys[0] not in origin else origin
        problems.append(lay_out(where, context["what"], context["advice"]))
    return None
