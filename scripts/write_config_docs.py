"""Write docs/config.md and docs/config.schema.json from smollm2/config/schema.py. A test checks that both are current."""

import json
from pathlib import Path

from smollm2.config.schema import FIELDS, SECTIONS, Config
from smollm2.config.vocabulary import ALIASES, describe_default, describe_key, describe_kind

DOCS = Path(__file__).resolve().parents[1] / "docs"

INTRODUCTION = """# Every key of a config

Written by `scripts/write_config_docs.py`; change `smollm2/config/schema.py` instead.

A config file is YAML with the sections `model`, `training`, `data` and `wandb`. Every section and every key may be left
out. Values come from the defaults below, then the file (`--config FILE`, else `./config.yaml`) or the preset
(`--preset nano`), then the flags: every key is also a flag, `--training.learning_rate 3e-4`, with a list written
`"[0.9, 0.95]"`. The key decides how a value is read: `1e-4` is a number, `no` is text where text belongs. Anchors,
aliases and tags are not supported. All mistakes of a file are reported at once, each with its line. The config that a
run used is in its run folder as `config.yaml`, each value with its origin. In paths, `~` is the home folder.

*On resume* says which keys may differ between a checkpoint and the run that resumes it: a `free` key does not change the
numbers, a `noted` one may change and is reported, and a change of a `refused` one would make it another run. `training.batch_size` and
`training.gradient_accumulation_steps` are refused where their product changes.
"""


def render_markdown() -> str:
    """Return the text of docs/config.md."""
    parts = [INTRODUCTION]
    for name, section in SECTIONS.items():
        rows = [
            f"| `{key}` | {describe_kind(f'{name}.{key}')} | {show_default(f'{name}.{key}')} | {section.resume_rule(key)} "
            f"| {describe_key(f'{name}.{key}')} |"
            for key in section.model_fields
        ]
        head = ["| key | takes | default | on resume | |", "|---|---|---|---|---|"]
        parts.append("\n".join([f"## {name}\n\n{section.__doc__}\n", *head, *rows]) + "\n")
    aliases = [f"- `{alias}`: {describe_key(alias)}" for alias in ALIASES]
    parts.append("## Aliases\n\n" + "\n".join(aliases) + "\n")
    return "\n".join(parts)


def show_default(key: str) -> str:
    """Return a default as code, or the key that it depends on as text."""
    default = describe_default(key)
    return default if default.startswith("from ") else f"`{default}`"


def render_schema() -> str:
    """Return the text of docs/config.schema.json, with which editors complete and check a config file."""
    schema = Config.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    for alias in ALIASES:
        section, name = alias.split(".")
        properties = schema["$defs"][SECTIONS[section].__name__]["properties"]
        properties[name] = {"type": "boolean", "description": describe_key(alias)}
    for key in FIELDS:
        section, name = key.split(".")
        properties = schema["$defs"][SECTIONS[section].__name__]["properties"][name]
        del properties["resume"], properties["takes"]
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    (DOCS / "config.md").write_text(render_markdown(), encoding="utf-8", newline="\n")
    (DOCS / "config.schema.json").write_text(render_schema(), encoding="utf-8", newline="\n")
