"""`evaluate` on conversations: the loss of the assistant's turns, equal to that of validation in training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizer import CHATML, chat_tokenizer
from runs import TINY, tiny_config, write_tiny
from twins import small_model

from smollm2 import evaluate, export, train
from smollm2.cli.evaluate import describe_evaluation
from smollm2.cli.main import main
from smollm2.data.chat import ChatEncoder, choose_template, with_chat
from smollm2.data.conversations import Message, to_json
from smollm2.data.packing import ConversationWindows, pack_documents
from smollm2.data.stream import MARK
from smollm2.data.tokenizer import load_tokenizer
from smollm2.errors import DataError
from smollm2.inference.evaluation import score_windows
from smollm2.model.transformer import SmolLM2

TOKENIZER = chat_tokenizer(CHATML)
ROWS = [
    [Message("user", "What is 2 + 2?"), Message("assistant", "4")],
    [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello, how are you?" * 4)],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "naïve"), Message("assistant", "c\n")],
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> SmolLM2:
    return small_model(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=256).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"messages": [turn._asdict() for turn in row]} for row in ROWS]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "chat.jsonl"


def encode(train_on: str) -> list[list[int]]:
    encoder = ChatEncoder(choose_template(TOKENIZER), train_on)
    return [encoder.encode_counted(to_json(row))[0] for row in ROWS]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_loss_is_that_of_validation(train_on: str, model: SmolLM2, file: Path) -> None:
    encoded = encode(train_on)
    ends = np.cumsum([len(ids) for ids in encoded]).astype("<u8")
    stream = np.array([i for ids in encoded for i in ids], "<u4")
    windows = ConversationWindows(stream, pack_documents(ends, 256), TOKENIZER.vocab_size)
    wanted = score_windows(model, windows, range(len(windows)), TOKENIZER.bytes_per_token, batch_size=2)
    found = evaluate(model, TOKENIZER, file, train_on=train_on, document_mask=True, batch_size=2)
    assert found["tokens"] == wanted.tokens
    assert found["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)


@torch.no_grad()
def test_a_target_of_a_long_conversation_is_scored_once_from_the_tokens_before_it(model: SmolLM2, file: Path) -> None:
    losses = []
    for marked in encode("assistant"):
        ids = [i % MARK for i in marked]
        for at in range(1, len(ids)):
            if marked[at] < MARK:
                start = max(0, -(-(at - 32) // 16)) * 16
                logits = model(torch.tensor([ids[start:at]]))[0, -1].double()
                losses.append(-logits.log_softmax(-1)[ids[at]].item())
    found = evaluate(model, TOKENIZER, file, context=32, stride=16, batch_size=3)
    assert (found["tokens"], found["parts"], found["unit"]) == (len(losses), 3, "conversations")
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_each_conversation_has_a_row(model: SmolLM2, file: Path) -> None:
    found = evaluate(model, TOKENIZER, file, per_document=True)
    targets = [sum(i < MARK for i in ids) for ids in encode("assistant")]
    assert [row["tokens"] for row in found["documents"]] == targets
    assert any("in 3 conversations, context 256" in line for line in describe_evaluation(found))


def test_plain_text_ends_as_in_training_and_not_as_a_turn(model: SmolLM2) -> None:
    text = "The end of a document is no end of a turn."
    ids = [*TOKENIZER.encode(text), TOKENIZER.id_of("<|endoftext|>")]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert evaluate(model, with_chat(choose_template(TOKENIZER)), text)["loss"] == pytest.approx(wanted, rel=1e-5)


def test_all_models_are_scored_as_the_first_was_trained(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    write_tiny(tmp_path, config=TINY.replace("data: {", "data: {train_on: all, on_bad_line: skip, "))
    train(tiny_config(tmp_path, "run", data__input=file, training__train_steps=1, training__warmup_steps=0), quiet=True)
    export(tmp_path / "run", folder)
    file.write_text(file.read_text() + "no JSON\n")
    assert main(["evaluate", str(tmp_path / "run"), str(folder), "--input_file", str(file)]) == 0
    assert f"{folder} and {tmp_path / 'run'} are equal in bits per byte, over 3 parts" in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--input_file", str(file), "--on_bad_line", "stop"]) == 3


def test_a_model_of_plain_text_cannot_score_them(model: SmolLM2, file: Path) -> None:
    plain: Any = load_tokenizer("bytes")
    with pytest.raises(DataError, match="the model has no chat template"):
        evaluate(model, plain, file)
