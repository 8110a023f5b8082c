"""A byte-level BPE as the keys of a GGUF file."""

import json
from typing import Any

from smollm2.data.token_bytes import map_bytes
from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import DataError
from smollm2.exporting.special_tokens import find_begin_of_text, find_end_of_turn, find_padding

Value = str | bool | int | float | list[str] | list[int]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {"gpt-2": [BYTE_LEVEL], "smollm": [DIGITS, BYTE_LEVEL]}
"""llama.cpp's names of the ways to split a text."""


def describe_tokenizer(tokenizer: Tokenizer, size: int) -> dict[str, Value]:
    """Return the tokenizer's keys, with unused tokens up to the model's vocabulary. Raise DataError if there are none."""
    spec: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    pre = find_pre_tokenizer(tokenizer, spec)
    tokens, types = list_tokens(spec, size)
    end = tokenizer.token(tokenizer.end_of_text)
    fields: dict[str, Value] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        # llama.cpp refuses a file without merges: this one can never apply, because no text splits into special tokens.
        "merges": [" ".join(pair) for pair in spec["model"]["merges"]] or [f"{end} {end}"],
        "bos_token_id": find_begin_of_text(tokenizer),
        "eos_token_id": tokenizer.end_of_text,
        "add_bos_token": bool(tokenizer.begin),
        "add_eos_token": bool(tokenizer.end),
        "add_space_prefix": False,
    }
    end_of_turn, padding = find_end_of_turn(tokenizer), find_padding(tokenizer)
    if end_of_turn is not None:
        fields["eot_token_id"] = end_of_turn
    if padding is not None:
        fields["padding_token_id"] = padding
    found = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return found if tokenizer.chat_template is None else found | {"tokenizer.chat_template": tokenizer.chat_template}


def find_pre_tokenizer(tokenizer: Tokenizer, spec: dict[str, Any]) -> str:
    """Return llama.cpp's name for how the tokenizer splits a text. Raise DataError if it has none."""
    model, advice = spec["model"], "export with --format huggingface"
    splitter = spec["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in splitter.get("pretokenizers", [splitter])
    ]
    pre = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    if model["type"] != "BPE" or spec["normalizer"] or any(model.get(key) for key in affixes) or pre is None:
        what = (
            "GGUF files are written for byte-level BPE tokenizers that split as GPT-2's or SmolLM2's does, not this one"
        )
        raise DataError(tokenizer.name, what, advice)
    if model.get("unk_token") and not map_bytes().keys() <= model["vocab"].keys():
        raise DataError(tokenizer.name, "llama.cpp has no unknown token for a byte-level BPE", advice)
    ids = (tokenizer.begin, [find_begin_of_text(tokenizer)]), (tokenizer.end, [tokenizer.end_of_text])
    if any(added not in ([], wanted) for added, wanted in ids):
        what = f"llama.cpp cannot put the ids {tokenizer.begin} before a text and {tokenizer.end} after it"
        raise DataError(tokenizer.name, what, advice)
    for token in spec["added_tokens"]:
        if not token["special"] and any(token[key] for key in ("single_word", "lstrip", "rstrip")):
            what = f"llama.cpp finds the token {token['content']!r} in other places (single_word, lstrip or rstrip)"
            raise DataError(tokenizer.name, what, advice)
    return pre


def list_tokens(spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the names and the types of `size` tokens."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in spec["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types
