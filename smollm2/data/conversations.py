"""Conversations in the rows of a JSONL file, in the four forms that data sets use.

messages         [{"role": "user", "content": "..."}, ...]
conversations    [{"from": "human", "value": "..."}, ...], as in ShareGPT
instruction      with `output` and perhaps `input`, as in Alpaca
prompt           with `completion`: texts, or lists of messages
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""The roles of the known forms, and what they are called here."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = list[Message]


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the fields of one of the four forms."""
    lists = any(isinstance(row.get(name), list) for name in ("messages", "conversations"))
    return lists or {"instruction", "output"} <= row.keys() or {"prompt", "completion"} <= row.keys()


def read_conversation(row: Mapping[str, Any], *, is_answered: bool = True) -> Conversation:
    """Return the conversation in a row. Raise ValueError with the reason if there is none that can be used.

    With `is_answered`, it must have a turn of the assistant.
    """
    messages = [read_message(one) for one in find_turns(row)]
    if not messages:
        raise ValueError("the conversation is empty")
    if is_answered and not any(message.role == "assistant" for message in messages):
        raise ValueError("the conversation has no turn of the assistant")
    return messages


def find_turns(row: Mapping[str, Any]) -> Iterable[Any]:
    """Return the turns of a row as it holds them. Raise ValueError if it is not a conversation."""
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list):
            turns: list[Any] = row[name]
            return turns
    if {"instruction", "output"} <= row.keys():
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("the fields 'instruction' and 'input' are not text")
        return [{"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row["output"]}]
    if {"prompt", "completion"} <= row.keys():
        return [*as_turns("user", row["prompt"]), *as_turns("assistant", row["completion"])]
    present = ", ".join(map(repr, list(row)[:8]))
    raise ValueError(f"the row is not a conversation (present: {present})")


def as_turns(role: str, value: Any) -> list[Any]:
    """Return a text as one turn, or a list of turns as it is."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def read_message(turn: Any) -> Message:
    """Return one turn. Raise ValueError with the reason if its role is unknown, or its content empty or not text."""
    if not isinstance(turn, dict):
        raise ValueError("a turn is not an object with a role and a content")
    name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"the role {name!r} is unknown (known: {', '.join(ROLES)})")
    if isinstance(content, list):
        content = join_parts(content)
    if not isinstance(content, str):
        raise ValueError(f"the content of a turn is not text but {type(content).__name__}")
    if not content.strip():
        raise ValueError(f"a turn of the {role} is empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(content[error.start]):04x} is half of a surrogate pair, not a character") from None
    return Message(role, content)


def join_parts(parts: list[Any]) -> str:
    """Return the text of a content that is a list of parts. Raise ValueError for a part that is not text."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"a part of a content is not text but {kind}")
    return "".join(part["text"] for part in parts)


def to_json(messages: Conversation) -> str:
    """Return a conversation as one line, the same for the same messages."""
    return json.dumps([list(message) for message in messages], ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Conversation:
    """Return the conversation that `to_json` wrote."""
    return [Message(role, content) for role, content in json.loads(text)]


def contents_of(text: str) -> str:
    """Return the contents of a conversation that `to_json` wrote, one after another."""
    return "\n".join(message.content for message in from_json(text))
