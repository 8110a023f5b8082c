"""`smollm2 chat`, with a model that knows nothing: what is read, kept, written and refused."""

import io
import json
from pathlib import Path

import pytest
from twins import small_model

from smollm2.cli.main import main
from smollm2.data.chat import CHATML, choose_template, with_chat
from smollm2.data.tokenizer import tokenizer_from_text
from smollm2.exporting.hugging_face import write_model_folder
from smollm2.exporting.source import Source
from smollm2.inference import generation
from smollm2.inference.chat import Chat

TOKENIZER = with_chat(
    choose_template(tokenizer_from_text("bytes").with_tokens(("<|im_start|>", "<|im_end|>")), "chatml")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a random model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "model"
    folder.mkdir()
    write_model_folder(Source(small_model(vocab_size=TOKENIZER.vocab_size), TOKENIZER, {}), folder)
    return folder


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))


def test_a_conversation_is_saved_as_training_reads_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "saved.jsonl"
    hello = generation.Piece(0, "Hello", "length")
    monkeypatch.setattr(generation, "stream", lambda *arguments, **named: iter([hello]))
    file.write_text('{"prompt": "a", "completion": "b"}')
    say(monkeypatch, f"Hi \U0001f600\n/save {file}\n/system Be brief.\nAgain\n/save {file}\n/reset\n/save {file}\n")
    assert main(["chat", str(model), "--max_new_tokens", "5"]) == 0
    before, *rows = (json.loads(line) for line in file.read_text().splitlines())
    assert before == {"prompt": "a", "completion": "b"}
    first, second = (row["messages"] for row in rows)
    assert first == [{"role": "user", "content": "Hi \U0001f600"}, {"role": "assistant", "content": "Hello"}]
    assert [turn["role"] for turn in second] == ["system", "user", "assistant"] and second[1]["content"] == "Again"
    notes = capsys.readouterr().err
    assert "tokens and did not end" in notes and "not saved: the conversation has no answer yet" in notes


def test_a_file_of_conversations_is_answered_after_its_last_question(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "old")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in turns], "id": 7},
        {"prompt": "x", "completion": "y"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["chat", str(model), "--conversations", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "4"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["id"] == 7 and first["end"] == "length"
    assert [turn["content"] for turn in first["messages"]] == ["s", "a", "b", "c", first["answer"]]
    assert second["messages"][0] == {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "rows.jsonl:1: the line is not a JSON object"),
        ("nothing", "rows.jsonl:1: the line is not a JSON object"),
        ('{"messages": []}', "rows.jsonl:1: the conversation is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "rows.jsonl:1: the conversation has no turn of the user"),
        ('{"messages": [{"role": "x", "content": "a"}]}', "rows.jsonl:1: the role 'x' is unknown"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_conversation_is_refused(
    line: str, reason: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    assert main(["chat", str(model), "--conversations", str(tmp_path / "rows.jsonl")]) == 3
    assert reason in capsys.readouterr().err


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    write_model_folder(Source(small_model(vocab_size=257), tokenizer_from_text("bytes"), {}), folder)
    assert main(["chat", str(folder)]) == 2
    assert "the model has no chat template" in capsys.readouterr().err
    assert main(["chat", str(folder), "--template", "chatml"]) == 3
    assert "needs <|im_start|> and <|im_end|>, which the tokenizer does not have" in capsys.readouterr().err
    assert main(["chat", str(folder), "--template", "absent.jinja"]) == 3
    assert "data.chat_template: the template absent.jinja cannot be read" in capsys.readouterr().err


def test_ctrl_c_ends_an_answer_and_keeps_what_was_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = generation.stream

    def interrupted(*arguments: object, **named: object) -> object:
        yield generation.Piece(0, "half", "")
        next(original(*arguments, **named))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    say(monkeypatch, f"Hi\n/save {tmp_path / 'saved.jsonl'}\n")
    assert main(["chat", str(model)]) == 0
    assert json.loads((tmp_path / "saved.jsonl").read_text())["messages"][1]["content"] == "half"
    assert "(stopped)" in capsys.readouterr().err


def test_a_byte_that_is_not_utf_8_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, b"caf\xe9\n".decode("utf-8", "surrogateescape"))
    assert main(["chat", str(model)]) == 3
    assert "standard input: byte 0xe9 after 'caf' is not UTF-8" in capsys.readouterr().err


def test_the_oldest_turns_leave_a_full_context_and_this_is_said() -> None:
    notes: list[str] = []
    template = choose_template(TOKENIZER)
    chat = Chat(template, positions=128, room=20, report=notes.append, system="sys")
    for number in range(4):
        ids = chat.ask(f"question {number}")
        chat.answer("an answer")
    assert len(ids) <= 108 and "the first 4 turns do not fit into the context of 128 tokens" in notes[-1]
    text = TOKENIZER.decode(ids)
    assert "sys" in text and "question 3" in text and "question 0" not in text
    assert len(chat.turns) == 8


def test_a_message_longer_than_the_context_is_still_asked() -> None:
    chat = Chat(choose_template(TOKENIZER), positions=128, room=20)
    assert len(chat.ask("x" * 10_000)) > 10_000


def test_a_question_without_an_answer_is_taken_back() -> None:
    chat = Chat(choose_template(TOKENIZER), positions=128, room=20)
    chat.ask("Hi")
    chat.answer("")
    assert chat.messages == []


def test_the_prompt_of_an_answer_is_the_template_up_to_the_assistants_turn() -> None:
    ids = Chat(choose_template(TOKENIZER), 128, 20).ask("Hi")
    backend = TOKENIZER.backend
    assert backend.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert choose_template(TOKENIZER).source == CHATML
