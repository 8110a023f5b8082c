"""Training on conversations: the same loop, checkpoints and resume as for text; only the targets differ."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import WORDS, metrics, outcome, tiny_config, write_tiny

from smollm2.cli.main import main
from smollm2.config.reading import load_config
from smollm2.config.schema import IGNORE_INDEX, Config
from smollm2.data.chat import choose_template
from smollm2.data.conversations import Message
from smollm2.data.corpus import Listener, open_corpus, training_windows
from smollm2.data.packing import ConversationWindows, pack_documents
from smollm2.data.stream import MARK
from smollm2.exporting.export import export
from smollm2.inference.generation import generate
from smollm2.inference.loading import load_model
from smollm2.training.loop import train

CHAT = """
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
  max_position_embeddings: 96, norm: rmsnorm}
training: {train_steps: 6, batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 1e-2, warmup_steps: 2,
  precision: float32, log_interval: 1, eval_interval: 3, eval_windows: 8, save_interval: 3, sample_interval: 3,
  sample_tokens: 4, sample_prompts: [Hi], preflight: false}
data: {input: chat.jsonl, tokenizer: bytes, chat_template: chatml, validation_fraction: 0.1}
"""


def write_chat(folder: Path, conversations: list[tuple[str, str]], config: str = CHAT) -> None:
    """A folder with chat.jsonl and config.yaml."""
    write_tiny(folder, config=config)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in conversations
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_in(folder: Path, save_dir: str, **flags: object) -> object:
    """The config of a chat run in a folder."""
    return tiny_config(folder, save_dir, data__input=folder / "chat.jsonl", **flags)


GREETINGS = [(f"Hello number {n}", f"Hi, {n}!") for n in range(40)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(4, 24), st.randoms(use_true_random=False))
def test_every_marked_answer_is_a_target_once_and_within_its_conversation(
    lengths: list[int], length: int, chance: random.Random
) -> None:
    ends = np.cumsum(lengths).astype("<u8")
    ids = np.arange(int(ends[-1])) + 1
    marked = np.array([i + MARK * (chance.random() < 0.5) for i in ids], dtype="<u4")
    if len(ids) < 2:
        return
    packs = pack_documents(ends, length)
    windows = ConversationWindows(marked, packs, len(ids) + 1)
    found: list[int] = []
    for index in range(len(windows)):
        batch = windows.read(index)
        assert batch.document_ids is not None and (np.diff(batch.document_ids) >= 0).all()
        for at in np.flatnonzero(batch.labels != IGNORE_INDEX):
            assert batch.labels[at] == batch.input_ids[at] + 1 == batch.input_ids[at + 1]
            assert batch.document_ids[at] == batch.document_ids[at + 1]
        found += batch.labels[batch.labels != IGNORE_INDEX].tolist()
    firsts = {int(start) + 1 for start in packs.starts}
    assert sorted(found) == [int(i) for i, m in zip(ids, marked, strict=True) if m < MARK and int(i) not in firsts]


def test_a_run_on_conversations_resumes_bit_identically_and_its_export_can_chat(tmp_path: Path) -> None:
    import transformers

    write_chat(tmp_path, GREETINGS)
    for run in ("whole", "parts"):
        train(config_in(tmp_path, run), quiet=True)  # type: ignore[arg-type]
    (tmp_path / "parts/step_0006.pt").unlink()
    train(load_config(tmp_path / "parts/config.yaml"), resume="auto", quiet=True)
    assert outcome(tmp_path / "parts", 6) == outcome(tmp_path / "whole", 6)
    tokenizer = load_model(tmp_path / "whole")[1]
    assert tokenizer.token(tokenizer.end_of_text) == "<|im_end|>"
    export(tmp_path / "whole", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [Message("user", "Hi")]
    text = theirs.apply_chat_template([messages[0]._asdict()], tokenize=False, add_generation_prompt=True)
    assert theirs(text, add_special_tokens=False)["input_ids"] == choose_template(tokenizer).encode_prompt(messages)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"][0] == tokenizer.end_of_text == theirs.eos_token_id


def test_a_stride_is_dropped_aloud_and_the_checkpoint_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat(tmp_path, GREETINGS)
    train(config_in(tmp_path, "run", training__train_steps=1, data__stride=48))  # type: ignore[arg-type]
    assert "data.stride: 48 -> 96, because the text is conversations" in capsys.readouterr().out
    assert load_model(tmp_path / "run")[1].chat_template


def test_windows_without_an_answer_are_named_and_make_no_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chat(tmp_path, [*[("word " * 150, "ok")] * 6, *GREETINGS])
    flags = {"training__batch_size": 1, "training__preflight": "true", "training__eval_interval": 0}
    train(config_in(tmp_path, "run", **flags))  # type: ignore[arg-type]
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path / "run") if "loss" in row)
    assert "windows have no target: their answers begin later than a window is long" in capsys.readouterr().out


def test_conversations_are_packed_and_apart_without_a_word_in_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chat(tmp_path, [*GREETINGS, ("Tell me more", "and more " * 40)])
    flags = {"training__train_steps": 1, "training__preflight": "true", "data__validation_fraction": 0}
    train(config_in(tmp_path, "run", **flags))  # type: ignore[arg-type]
    assert "padding; 1 document was cut" in capsys.readouterr().out
    data = load_config(tmp_path / "run/config.yaml").data
    assert (data.pack, data.document_mask, data.stride) == ("best_fit", True, 96)
    assert "document_mask: true  # the text is conversations" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"messages": [{"role": "user", "content": "a"}]}'], "chat.jsonl:1: the conversation has no turn of the assistant"),
        (['{"messages": [{"role": "robot", "content": "a"}]}'], "chat.jsonl:1: the role 'robot' is unknown"),
        (['{"messages": []}'], "chat.jsonl:1: the conversation is empty"),
        (['{"prompt": "a", "completion": "b"}', '{"text": "c"}'], "chat.jsonl:2: the row is not a conversation (present: 'text')"),
        (['{"prompt": "a", "completion": " "}'], "chat.jsonl:1: a turn of the assistant is empty"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_one_sentence_with_its_line(
    rows: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, config=CHAT)
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    assert main(["train", "--save_dir", "run"]) == 3
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def mixed_config(folder: Path, save_dir: str, **values: Any) -> Config:
    """The config of a run on conversations and plain text in equal parts."""
    sources = {str(folder / name): 0.5 for name in ("input.txt", "chat.jsonl")}
    write_chat(folder, GREETINGS, config=CHAT.replace("input: chat.jsonl", f"mixture: {json.dumps(sources)}"))
    (folder / "input.txt").write_text("\f".join(f"{n} {WORDS[: 40 + n]}" for n in range(40)))
    places: dict[str, Any] = {"training.save_dir": str(folder / save_dir), "data.document_separator": "\f"}
    return load_config(folder / "config.yaml", **{**places, **values})


def test_a_run_on_text_and_conversations_resumes_bit_identically(tmp_path: Path) -> None:
    for run in ("whole", "parts"):
        train(mixed_config(tmp_path, run), quiet=True)
    (tmp_path / "parts/step_0006.pt").unlink()
    train(load_config(tmp_path / "parts/config.yaml"), resume="auto", quiet=True)
    assert outcome(tmp_path / "parts", 6) == outcome(tmp_path / "whole", 6)


def test_plain_text_beside_conversations_is_trained_on_whole_and_ends_with_its_own_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(mixed_config(tmp_path, "checkpoints", **{"training.train_steps": 1, "training.preflight": True}))
    assert "smollm2 chat " in capsys.readouterr().out.splitlines()[-1]
    config = load_config(tmp_path / "checkpoints/config.yaml")
    tokenizer = load_model(tmp_path / "checkpoints")[1]
    listener = Listener(lambda line: None, lambda *progress: None)
    corpus = open_corpus(config, listener, is_chosen=True, saved=tokenizer)
    text, chat = (training_windows(config, tokenizer, store) for store in corpus.stores)
    ends, turns = tokenizer.id_of("<|endoftext|>"), tokenizer.id_of("<|im_end|>")
    window = text.read(0)
    inside = window.document_ids == 0
    assert (window.labels[inside][:-1] == window.input_ids[inside][1:]).all()
    labels = [np.concatenate([source.read(n).labels for n in range(len(source))]) for source in (text, chat)]
    assert (labels[0] == ends).sum() > 10 and not (labels[0] == turns).any()
    assert (labels[1] == turns).sum() > 30 and not (labels[1] == ends).any()


@pytest.mark.parametrize("name", ["chat.jsonl", "input.txt"])
def test_what_must_not_get_worse_may_be_of_either_kind(name: str, tmp_path: Path) -> None:
    values = {"training.train_steps": 1, "data.regression_input": str(tmp_path / name), "data.validation_fraction": 0}
    train(mixed_config(tmp_path, "run", **values), quiet=True)
    found = [row["regression_bpb"] for row in metrics(tmp_path / "run") if "regression_bpb" in row]
    assert len(found) == 2 and found[1] < found[0]


def test_token_files_and_conversations_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_chat(tmp_path, GREETINGS, config=CHAT.replace("input: chat.jsonl, ", ""))
    np.arange(200, dtype="<u2").tofile(tmp_path / "tokens.bin")
    assert main(["train", "--data.mixture", "{tokens.bin: 0.5, chat.jsonl: 0.5}"]) == 3
    assert "tokens.bin: tokens that another program made cannot be mixed with conversations" in capfd.readouterr().err


def test_tokens_are_added_as_rows_near_the_mean_and_the_head_stays_tied(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, "base", training__train_steps=1), quiet=True)
    write_chat(tmp_path, GREETINGS, config=CHAT.replace("tokenizer: bytes, ", "").replace("96, norm: rmsnorm", "96")
               .replace("model:", "unused:").split("\n", 3)[3])  # fmt: skip
    flags = {"model__init_from": tmp_path / "base", "training__train_steps": 1, "training__sequence_length": 32,
             "data__add_tokens": "[<|im_start|>, <|im_end|>, <|tool|>]", "training__learning_rate": "1e-9"}  # fmt: skip
    train(config_in(tmp_path, "tuned", **flags), quiet=True)  # type: ignore[arg-type]
    before, after = (load_model(tmp_path / run)[0] for run in ("base", "tuned"))
    old, new = before.model.embed_tokens.weight, after.model.embed_tokens.weight
    assert new.shape[0] == old.shape[0] + 3 and after.lm_head.weight is new
    assert torch.allclose(new[:257], old, atol=1e-6)
    assert (new[257:] - old.mean(0)).abs().max() < old.std() and len(torch.unique(new[257:], dim=0)) == 3


@pytest.mark.slow
def test_a_tuned_model_answers_and_stops_by_itself(tmp_path: Path) -> None:
    """The number after another, of three digits; 40 of 900 are held out."""
    chance = random.Random(0)
    numbers = list(range(100, 1000))
    chance.shuffle(numbers)
    held_out, seen = numbers[:40], numbers[40:]
    config = CHAT.replace("hidden_size: 32", "hidden_size: 96").replace(
        "intermediate_size: 64", "intermediate_size: 256"
    )
    write_chat(tmp_path, [(f"After {n}?", str(n + 1)) for n in seen], config=config)
    flags = {"training__train_steps": 500, "training__optimizer": "muon", "training__batch_size": 16,
             "training__eval_interval": 0, "training__save_interval": 0, "training__sample_interval": 0,
             "training__diagnostics_interval": 0}  # fmt: skip
    train(config_in(tmp_path, "run", **flags), quiet=True)  # type: ignore[arg-type]
    model, tokenizer = load_model(tmp_path / "run")
    template = choose_template(tokenizer)
    prompts = [template.encode_prompt([Message("user", f"After {n}?")]) for n in held_out]
    answers = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0)
    assert all(len(answer) < 8 for answer in answers)
    assert sum(answer == str(n + 1) for answer, n in zip(answers, held_out, strict=True)) >= 38
