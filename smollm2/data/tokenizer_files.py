"""The files beside tokenizer.json in a model's folder: what they say of the tokenizer, and the files themselves.

They come with the tokenizer and are written again as they were, byte for byte: transformers, vLLM and other programs read
settings from them that this package does not use.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smollm2.errors import DataError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

KEPT = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    GENERATION,
    CHAT_TEMPLATE,
    "added_tokens.json",
    "chat_template.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
)
"""The files that are kept, besides tokenizer.json."""

Files = Mapping[str, bytes]
"""The content of each file by name."""


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files that are kept. Raise DataError if one cannot be read."""
    found = {}
    for name in KEPT:
        path = folder / name
        try:
            found[name] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(path, f"the file cannot be read ({error.strerror})", "replace it") from None
    return found


def parse(files: Files, name: str, folder: str = "") -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file is absent. Raise DataError if it is damaged."""
    if name not in files:
        return {}
    try:
        value: Any = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(Path(folder) / name, f"the file cannot be read ({reason})", "replace it") from None
    return value if isinstance(value, dict) else {}


def find_end_of_text(files: Files, model: Mapping[str, Any], folder: str = "") -> int | str | None:
    """Return the end of text that tokenizer_config.json names, or else `model`, the content of config.json."""
    for value in (parse(files, TOKENIZER_CONFIG, folder).get("eos_token"), model.get("eos_token_id")):
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int | str) and not isinstance(value, bool):
            return value
    return None


def find_begin_of_text(files: Files) -> str | None:
    """Return the name of the begin-of-text token according to tokenizer_config.json or special_tokens_map.json."""
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        value = parse(files, name).get("bos_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


def list_stops(files: Files) -> list[int]:
    """Return the ids at which generation ends, according to generation_config.json."""
    found = parse(files, GENERATION).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]


def find_chat_template(files: Files) -> str | None:
    """Return the chat template: a file of its own, or in tokenizer_config.json (of several, the one named `default`)."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode("utf-8", "replace")
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        found = parse(files, name).get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
