"""Rows of a JSONL file as conversations."""

from typing import Any

import pytest

from smollm2.data.conversations import Message, from_json, is_conversation, read_conversation, to_json

ASKED = [Message("user", "Hi"), Message("assistant", "Hello")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                      {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "id": 3},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
    ],
)  # fmt: skip
def test_the_four_forms_give_the_same_conversation(row: dict[str, Any]) -> None:
    assert is_conversation(row)
    assert read_conversation(row) == ASKED


def test_an_alpaca_input_follows_the_instruction() -> None:
    found = read_conversation({"instruction": "Add", "input": "1 and 2", "output": "3"})
    assert found[0] == Message("user", "Add\n\n1 and 2")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "the conversation is empty"),
        ([{"role": "user", "content": "a"}], "has no turn of the assistant"),
        ([{"role": "robot", "content": "a"}], "the role 'robot' is unknown (known: system, user, human"),
        ([{"content": "a"}], "the role None is unknown"),
        ([{"role": "assistant", "content": " \n"}], "a turn of the assistant is empty"),
        ([{"role": "assistant", "content": 3}], "the content of a turn is not text but int"),
        ([{"role": "assistant", "content": None}], "the content of a turn is not text but NoneType"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "a part of a content is not text but image"),
        ([{"role": "assistant", "content": "\ud800"}], "\\ud800 is half of a surrogate pair"),
        (["a"], "a turn is not an object"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(turns: list[Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_conversation({"messages": turns})
    assert reason in str(caught.value)


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a"}, {"messages": "a"}, {"instruction": "a"}])
def test_other_rows_are_no_conversations(row: dict[str, Any]) -> None:
    assert not is_conversation(row)


def test_a_conversation_comes_back_from_its_line() -> None:
    messages = [Message("user", 'a "b"\n\u2028漢字'), Message("assistant", "\\n")]
    assert from_json(to_json(messages)) == messages
    assert "\n" not in to_json(messages)
