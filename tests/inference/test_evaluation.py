"""The loss on a text: each token scored once, equal to a loop that scores them one by one, in bounded memory."""

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import WORDS, tiny_config, write_tiny
from twins import small_model

from smollm2 import evaluate, load_model, train
from smollm2.cli.main import main
from smollm2.data.tokenizer import Tokenizer, load_tokenizer
from smollm2.data.windows import Windows
from smollm2.errors import ConfigError, DataError
from smollm2.inference.evaluation import Comparison, Evaluation, compare_evaluations, score_text, score_windows
from smollm2.inference.ratio import Ratio
from smollm2.inference.text_windows import TextWindow, slide
from smollm2.model.transformer import SmolLM2

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer naïve slings. "


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> SmolLM2:
    return small_model(vocab_size=257, max_position_embeddings=32).eval()


@torch.no_grad()
def score_one_by_one(model: SmolLM2, ids: list[int], length: int, stride: int, end: int | None = None) -> float:
    """The mean loss of ids[1:], each from the first window that reaches it, the definition as a loop; where `end` ends
    documents that are isolated, without the first of each, and from its own document alone."""
    losses: list[float] = []
    for target in range(1, len(ids)):
        if ids[target - 1] == end:
            continue
        start = max(0, -(-(target - length) // stride)) * stride
        start = max([start, *(at + 1 for at in range(start, target) if ids[at] == end)])
        logits = model(torch.tensor([ids[start:target]]))[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[target]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [7, 16, 32])
def test_the_loss_is_that_of_a_loop_over_the_tokens(stride: int, model: SmolLM2, tokenizer: Tokenizer) -> None:
    found = evaluate(model, tokenizer, TEXT, stride=stride, batch_size=3)
    ids = [*tokenizer.encode(TEXT), tokenizer.end_of_text]
    expected = score_one_by_one(model, ids, 32, stride)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(
        expected * (len(ids) - 1) / math.log(2) / (len(TEXT.encode()) - 1), rel=1e-6
    )


def test_documents_are_scored_alone_behind_an_end_of_text(model: SmolLM2, tokenizer: Tokenizer) -> None:
    texts = ["a short one", TEXT, "x"]
    found = evaluate(model, tokenizer, "\f".join(texts), separator="\f", per_document=True, stride=16)
    end = tokenizer.end_of_text
    for text, row in zip(texts, found["documents"], strict=True):
        ids = [end, *tokenizer.encode(text), end]
        assert row["loss"] == pytest.approx(score_one_by_one(model, ids, 32, 16), rel=1e-6)
        assert (row["tokens"], row["bytes"]) == (len(ids) - 1, len(text.encode()))
    assert found["tokens"] == sum(row["tokens"] for row in found["documents"])
    assert found["loss"] == pytest.approx(
        sum(row["loss"] * row["tokens"] for row in found["documents"]) / found["tokens"]
    )


@pytest.mark.parametrize("per_document", [False, True])
def test_blank_documents_are_not_scored(per_document: bool, model: SmolLM2, tokenizer: Tokenizer) -> None:
    with_blank, without = (
        evaluate(model, tokenizer, text, separator="\f", per_document=per_document)
        for text in ("some text\f \n\t\f\fmore", "some text\fmore")
    )
    assert with_blank == without and len(without.get("documents", "ab")) == 2


def test_a_separator_that_never_occurs_in_the_file_is_reported(
    model: SmolLM2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(b"one\r\n\r\ntwo")
    notes: list[str] = []
    evaluate(model, tokenizer, tmp_path / "text.txt", separator="\n\n", report=notes.append)
    assert len(notes) == 1 and r"'\r\n\r\n' does: use that." in notes[0]


def test_one_stream_of_documents_has_an_end_of_text_after_each(model: SmolLM2, tokenizer: Tokenizer) -> None:
    found = evaluate(model, tokenizer, "ab\fcd", separator="\f", stride=16)
    end = tokenizer.end_of_text
    ids = [*b"ab", end, *b"cd", end]
    assert found["loss"] == pytest.approx(score_one_by_one(model, ids, 32, 16), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_does_not_change_the_loss(batch_size: int, model: SmolLM2, tokenizer: Tokenizer) -> None:
    wanted = evaluate(model, tokenizer, TEXT)["loss"]
    assert evaluate(model, tokenizer, TEXT, batch_size=batch_size)["loss"] == pytest.approx(wanted, rel=1e-6)


DOCUMENTS = [TEXT, "n", "to be, or", TEXT[:40]]


@pytest.mark.parametrize("stride", [1, 16, 32])
def test_isolated_documents_see_nothing_of_one_another(stride: int, model: SmolLM2, tokenizer: Tokenizer) -> None:
    found = evaluate(model, tokenizer, "\f".join(DOCUMENTS), separator="\f", stride=stride, document_mask=True)
    end = tokenizer.end_of_text
    ids = [token for text in DOCUMENTS for token in (*tokenizer.encode(text), end)]
    assert found["loss"] == pytest.approx(score_one_by_one(model, ids, 32, stride, end), rel=1e-6)
    assert found["tokens"] == found["bytes"] + len(DOCUMENTS) == len(ids) - len(DOCUMENTS)
    windows = Windows(np.array(ids, np.uint16), 32, stride, 257, end)
    in_training = score_windows(model, windows, range(len(windows)), tokenizer.bytes_per_token, batch_size=3)
    assert in_training.loss == pytest.approx(found["loss"], rel=1e-6)
    assert in_training.tokens == found["tokens"]


def test_isolated_documents_are_scored_alone_without_their_first_token(model: SmolLM2, tokenizer: Tokenizer) -> None:
    text = "\f".join(DOCUMENTS)
    found = evaluate(model, tokenizer, text, separator="\f", per_document=True, stride=16, document_mask=True)
    for text, row in zip(DOCUMENTS, found["documents"], strict=True):
        ids = [tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.end_of_text]
        assert row["loss"] == pytest.approx(score_one_by_one(model, ids, 32, 16, tokenizer.end_of_text), rel=1e-6)
        assert row["tokens"] == len(ids) - 2


@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 25, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_every_target_is_in_one_row_whatever_the_blocks(count: int, stride: int, block: int) -> None:
    ids = list(range(count))
    blocks = [ids[start : start + block] for start in range(0, count, block)]
    rows = list(slide(0, blocks, 8, stride))
    assert [target for row in rows for target in row.ids[row.context + 1 :]] == ids[1:]
    assert all(len(row.ids) <= 9 for row in rows)


def test_the_interval_holds_the_true_loss_in_about_95_of_100_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        ratio = Ratio()
        for tokens in torch.randint(20, 60, (100,), generator=generator).tolist():
            ratio.add(float((3 + torch.randn(tokens, generator=generator)).sum()), tokens)
        low, high = ratio.interval() or (0, 0)
        hits += low <= 3 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_one_window_has_no_interval(model: SmolLM2, tokenizer: Tokenizer) -> None:
    assert evaluate(model, tokenizer, "short")["loss_interval"] is None


def test_a_file_is_streamed_not_held(model: SmolLM2, tokenizer: Tokenizer) -> None:
    ids = [0] * 1000
    tracemalloc.start()
    rows = sum(1 for _ in slide(0, (list(ids) for _ in range(2000)), 64, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == -(-(2_000_000 - 1) // 64)
    assert peak < 200_000


@pytest.mark.slow
def test_a_file_of_megabytes_is_read_in_bounded_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny = small_model(vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    path = tmp_path / "large.txt"
    path.write_text(WORDS * 60_000, encoding="utf-8")
    tracemalloc.start()
    found = evaluate(tiny, tokenizer, path, stride=128, batch_size=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["tokens"] == path.stat().st_size
    assert peak < 30e6


def test_what_a_tokenizer_cannot_express_is_counted(smollm2_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_tokenizer_folder))
    wide = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=16)
    assert evaluate(wide, tokenizer, "a\x04b c")["unencodable_bytes"] == 1


def test_a_text_without_a_target_is_refused(model: SmolLM2, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="the text is too short: it has no token to predict"):
        evaluate(model, tokenizer, "")


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_beyond_the_context_is_refused(stride: int, model: SmolLM2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"stride: {stride} is out of range for a context of 32"):
        evaluate(model, tokenizer, TEXT, stride=stride)


def test_the_default_context_is_the_trained_length_and_another_can_be_requested(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=257, max_position_embeddings=64)
    model.trained_length = 16
    ids = [*tokenizer.encode(TEXT), tokenizer.end_of_text]
    for requested, length in ((None, 16), (32, 32), (64, 64)):
        found = evaluate(model, tokenizer, TEXT, context=requested)
        assert (found["context"], found["stride"]) == (length, length // 2)
        assert found["loss"] == pytest.approx(score_one_by_one(model, ids, length, length // 2), rel=1e-6)


@pytest.mark.parametrize("context", [0, 33])
def test_a_context_beyond_the_models_positions_is_refused(context: int, model: SmolLM2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"context: {context} is out of range: the model has 32 positions"):
        evaluate(model, tokenizer, TEXT, context=context)


def test_the_training_mode_comes_back_after_a_failed_evaluation(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=257).train()
    windows = iter([TextWindow(0, [1, 300, 2], 0)])
    with pytest.raises((IndexError, RuntimeError)):
        list(score_text(model, windows, tokenizer.bytes_per_token, None, batch_size=1))
    assert model.training


def test_the_training_mode_comes_back_after_an_evaluation_that_is_not_read_to_its_end(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=257).train()
    windows = iter([TextWindow(0, [1, 2, 3], 0)] * 9)
    scored = score_text(model, windows, tokenizer.bytes_per_token, None, batch_size=1)
    next(scored)
    scored.close()  # type: ignore[attr-defined]
    assert model.training


def test_two_models_are_compared_by_the_paired_differences_of_their_windows(tokenizer: Tokenizer) -> None:
    text = TEXT * 8
    models = [small_model(seed, vocab_size=257, max_position_embeddings=32) for seed in (0, 1)]
    first, second = (evaluate(model, tokenizer, text, keep_scores=True) for model in models)
    found = compare_evaluations(first, second)
    assert found is not None and found.interval is not None
    assert found.difference == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])
    assert found.interval[0] < found.difference < found.interval[1]
    unpaired = first["bits_per_byte_interval"][1] - first["bits_per_byte_interval"][0]
    assert found.interval[1] - found.interval[0] < 2 * unpaired
    back = compare_evaluations(second, first)
    assert back is not None and back.difference == pytest.approx(-found.difference)


def test_a_model_does_not_differ_from_itself(model: SmolLM2, tokenizer: Tokenizer) -> None:
    found = evaluate(model, tokenizer, TEXT, keep_scores=True)
    same = compare_evaluations(found, found)
    assert same == Comparison(0.0, (0.0, 0.0), found["parts"])
    assert not same.is_significant


def test_windows_that_do_not_hold_the_same_text_are_not_compared(model: SmolLM2, tokenizer: Tokenizer) -> None:
    first, second = (evaluate(model, tokenizer, TEXT, context=n, keep_scores=True) for n in (32, 16))
    assert compare_evaluations(first, second) is None


def test_the_paired_interval_holds_the_true_difference_in_about_95_of_100_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        sizes = torch.randint(20, 60, (80,), generator=generator).tolist()
        hard = torch.randn(80, generator=generator) * 20  # what both models find hard
        noise = torch.randn(2, 80, generator=generator)
        scores = [
            [
                Evaluation((3 * size + float(h) + float(e) + extra * size) * math.log(2), size, size)
                for size, h, e in rows
            ]
            for extra, rows in (
                (0.0, zip(sizes, hard, noise[0], strict=True)),
                (0.1, zip(sizes, hard, noise[1], strict=True)),
            )
        ]
        found = compare_evaluations({"scores": scores[0]}, {"scores": scores[1]})
        assert found is not None and found.interval is not None
        hits += found.interval[0] <= 0.1 <= found.interval[1]
    assert 0.92 <= hits / 400 <= 0.98


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose text has documents, isolated."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny(folder, text="\f".join([WORDS] * 40))
    train(tiny_config(folder, training__sample_tokens=0, data__document_separator="\f", data__document_mask="true"))
    return folder


def test_the_command_reads_documents_as_the_checkpoint_was_trained(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = run_folder / "checkpoints" / "step_0012.pt", run_folder / "input.txt"
    assert main(["evaluate", str(path), "--input_file", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = evaluate(*load_model(path), text, separator="\f", document_mask=True)
    assert found == json.loads(json.dumps(wanted))


@pytest.mark.parametrize("flags", [[], ["--best"]])
def test_the_command_takes_the_newest_or_the_best_checkpoint_of_a_run_folder(
    flags: list[str], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = run_folder / "checkpoints", str(run_folder / "input.txt")
    name = json.loads((folder / "best.json").read_text())["file"] if flags else "step_0012.pt"
    answers = []
    for model in ([str(folder), *flags], [str(folder / name)]):
        assert main(["evaluate", *model, "--input_file", text, "--json", "--device", "cpu"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_the_table_has_the_interval_and_a_row_for_each_document(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = run_folder / "checkpoints" / "step_0012.pt", run_folder / "input.txt"
    assert main(["evaluate", str(path), "--input_file", str(text), "--per_document"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss ") and " 95 %: " in lines[0]
    assert "in 40 documents, context 32, stride 16" in lines[3]
    assert lines[-1] == "and 20 more; --json lists all"


def test_the_command_compares_several_models(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(run_folder / "checkpoints" / f"step_{step:04d}.pt") for step in (12, 4)]
    flags = ["--input_file", str(run_folder / "input.txt")]
    assert main(["evaluate", *names, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["models"]] == names
    losses = [row["bits_per_byte"] for row in found["models"]]
    assert found["differences"][0]["difference"] == pytest.approx(losses[1] - losses[0])
    assert main(["evaluate", *names, *flags, "--context", "16"]) == 0
    out = capsys.readouterr().out
    assert f"{names[1]} is worse than {names[0]} by " in out
    assert out.count("context 16, stride 8") == 2


MISTAKES = {
    "no checkpoint": (["absent.pt", "--input_file", "input.txt"], 4),
    "no text": (["checkpoints/step_0012.pt"], 2),
    "a text that is not there": (["checkpoints/step_0012.pt", "--input_file", "absent.txt"], 3),
    "a folder as text": (["checkpoints/step_0012.pt", "--input_file", "."], 3),
    "an empty separator": (["checkpoints/step_0012.pt", "--input_file", "input.txt", "--document_separator", ""], 2),
    "a context that is too long": (["checkpoints/step_0012.pt", "--input_file", "input.txt", "--context", "9999"], 2),
    "a stride that is too long": (["checkpoints/step_0012.pt", "--input_file", "input.txt", "--stride", "99"], 2),
    "a run folder that is none": ([".", "--input_file", "input.txt"], 4),
    "standard input for two models": ([*2 * ["checkpoints/step_0012.pt"], "--input_file", "-"], 2),
    "no batch": (["checkpoints/step_0012.pt", "--input_file", "input.txt", "--batch_size", "0"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_its_exit_code(
    arguments: list[str],
    code: int,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run_folder)
    assert main(["evaluate", *arguments]) == code
    assert capsys.readouterr().err.count("\n") == 1
