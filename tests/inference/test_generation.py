"""Generated text depends on the model, the prompt and the seed, and follows the model's distribution."""

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import WORDS, tiny_config, write_tiny
from twins import small_model, transformers_twin, without_bf16, write_hugging_face_folder

from smollm2.cli.main import main
from smollm2.data.tokenizer import Tokenizer, load_tokenizer
from smollm2.errors import ConfigError, DataError, TrainingError
from smollm2.inference.decoding import Decoder
from smollm2.inference.generation import Writer, generate, stream
from smollm2.inference.sampling import Sampling, keep_likely, penalize, sample
from smollm2.model.cache import KeyValueCache
from smollm2.model.transformer import SmolLM2
from smollm2.training.loop import train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> SmolLM2:
    return small_model(vocab_size=257)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its one sentence a little; best.json names a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny(folder)
    train(tiny_config(folder))
    return folder / "checkpoints"


PROMPTS = [(WORDS * 2)[start : start + 1 + start * 7 % 60] for start in range(50)]


def test_greedy_text_of_50_prompts_is_that_of_transformers_alone_and_side_by_side(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=257, max_position_embeddings=256)
    twin = transformers_twin(model)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        end = {"eos_token_id": tokenizer.end_of_text, "pad_token_id": 0}
        found = twin.generate(ids, max_new_tokens=24, do_sample=False, **end)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(found.tolist()))
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=24, temperature=0)
    assert together == expected
    assert [generate(model, tokenizer, [p], max_new_tokens=24, temperature=0)[0] for p in PROMPTS] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", [{"norm": "layernorm"}, {"num_key_value_heads": 4}, {"head_dim": 32}])
def test_one_token_after_another_has_the_logits_of_the_whole_text(
    changes: dict[str, object], rows: int, dtype: torch.dtype
) -> None:
    model = small_model(**changes).eval()
    ids = torch.randint(0, 320, (rows, 70), generator=torch.Generator().manual_seed(0))
    shape = (3, rows, model.config.num_key_value_heads, 128, model.config.head_dim)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast:
        cache = KeyValueCache(torch.zeros(rows).long(), shape, dtype, positions=128)
        decoder = Decoder(model, dtype, rows)
        model.model.extend(ids[:, :60], cache)
        logits = torch.stack([decoder.step(token, cache) for token in ids[:, 60:].unbind(1)], 1)
        difference = (logits - model(ids)[:, 60:]).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 5e-2)


def test_a_text_depends_on_its_own_prompt_and_seed_not_on_the_rest_of_the_batch(
    model: SmolLM2, tokenizer: Tokenizer
) -> None:
    alone = generate(model, tokenizer, ["abc"], max_new_tokens=300, seed=3)
    torch.manual_seed(99)
    assert generate(model, tokenizer, ["xyz" * 30, "abc", ""], max_new_tokens=300, seed=2)[1:2] == alone
    assert generate(model, tokenizer, ["abc"], max_new_tokens=300, seed=4) != alone


def test_a_prompt_that_is_repeated_in_a_batch_gets_other_draws(model: SmolLM2, tokenizer: Tokenizer) -> None:
    texts = generate(model, tokenizer, ["abc"] * 4, max_new_tokens=40, seed=3)
    assert len(set(texts)) == 4


def test_a_single_string_is_one_prompt(model: SmolLM2, tokenizer: Tokenizer) -> None:
    assert generate(model, tokenizer, "abc", max_new_tokens=9) == generate(model, tokenizer, ["abc"], max_new_tokens=9)


@pytest.mark.parametrize(
    ("positions", "dtype"), [(100, torch.float32), (70, torch.float32), (128, torch.float32), (100, torch.bfloat16)]
)
def test_short_texts_continue_after_the_longest_of_the_batch_has_ended(
    positions: int, dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    """The finished row keeps its place in the batch, at a position that the rotary table has."""
    model = small_model(vocab_size=257, max_position_embeddings=positions)
    prompts = ["x" * (positions - 8), "hello"]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        stop = [generate(model, tokenizer, prompts[0], max_new_tokens=8, temperature=0)[0][-2:]]
        alone = [generate(model, tokenizer, [p], max_new_tokens=120, temperature=0, stop=stop)[0] for p in prompts]
        assert generate(model, tokenizer, prompts, max_new_tokens=120, temperature=0, stop=stop) == alone


def test_a_row_that_has_ended_stays_inside_the_positions_of_the_model() -> None:
    cache = KeyValueCache(torch.tensor([0, 90]), (1, 2, 1, 128, 4), torch.float32, positions=100)
    cache.advance(99)
    found = [cache.advance(1)[0].flatten().tolist() for _ in range(4)]
    assert found == [[99, 9], [99, 10], [99, 11], [99, 12]]


def test_torchs_random_state_is_left_alone(model: SmolLM2, tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    generate(model, tokenizer, [""], max_new_tokens=5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_prompt_longer_than_the_context_loses_its_start_and_that_is_reported(
    model: SmolLM2, tokenizer: Tokenizer
) -> None:
    reported: list[str] = []
    long = "word " * 60
    pieces = stream(
        model, tokenizer, [long], [0], max_new_tokens=1, sampling=Sampling(temperature=0), report=reported.append
    )
    text = "".join(piece.text for piece in pieces)
    assert reported == ["the prompt has 300 tokens and the context 128: the first 172 are ignored"]
    assert [text] == generate(model, tokenizer, [long[-128:]], max_new_tokens=1, temperature=0)


def test_a_full_context_slides_by_its_older_half(model: SmolLM2, tokenizer: Tokenizer) -> None:
    reported: list[str] = []
    prompt = "x" * 120
    sampling = Sampling(temperature=0)
    pieces = stream(model, tokenizer, [prompt], [0], max_new_tokens=10, sampling=sampling, report=reported.append)
    ids = tokenizer.encode(prompt)
    for _ in range(10):
        window = ids if len(ids) <= 128 else ids[129 - 64 :]
        with torch.no_grad():
            ids.append(int(model(torch.tensor([window]))[0, -1].argmax()))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids[120:])
    assert reported == ["the context of 128 tokens is full: from now on the model reads the last 64"]


def test_a_bf16_model_writes(model: SmolLM2, tokenizer: Tokenizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        texts = generate(model, tokenizer, ["ab", "abc" * 30], max_new_tokens=80, temperature=0)
    assert all(texts)


def test_sampling_follows_the_distribution_of_the_likeliest() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    probabilities = keep_likely(logits, Sampling(temperature=0.5, top_k=3)).softmax(-1)
    expected = torch.cat(((logits[0, :3] / 0.5).softmax(-1), torch.zeros(1)))
    assert torch.allclose(probabilities[0], expected)

    generators = [torch.Generator().manual_seed(0)] * 4000
    sampling = Sampling(temperature=0.5, top_k=3)
    drawn = torch.tensor(sample(logits.expand(4000, -1), sampling, [[]] * 4000, generators))
    assert (drawn.bincount(minlength=4) / 4000 - expected).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-45, 1e-300])
def test_a_temperature_that_underflows_draws_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([[2.0, 5.0, -1.0], [0.25, 0.0, 0.125]])
    generators = [torch.Generator().manual_seed(0)] * 2
    assert sample(logits, Sampling(temperature=temperature, top_k=None), [[], []], generators) == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported_as_our_own_error(value: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, value, 1.0]])
    generators = [torch.Generator().manual_seed(0)] * 2
    with pytest.raises(TrainingError, match="the model's logits: contain NaN or infinity"):
        sample(logits, Sampling(temperature=temperature), [[], []], generators)


SETTINGS = [
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"top_p": 1e-6},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_may_be_drawn_is_what_transformers_leaves(settings: dict[str, float]) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling = Sampling(**{"temperature": 1.0, "top_k": None, **settings})  # type: ignore[arg-type]
    warpers: Any = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(1)) * 3
    ids: Any = torch.zeros(8, 1, dtype=torch.long)
    theirs = LogitsProcessorList(warpers)(ids, logits)
    assert torch.equal(keep_likely(logits, sampling), theirs)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ids = [3, 7, 7, 40]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits[None].clone())[0]
    assert torch.equal(penalize(logits, ids, Sampling(repetition_penalty=1.3)), theirs)


@pytest.mark.parametrize(
    "value",
    [
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0},
        {"min_p": 2},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 1e-40},
    ],
)
def test_an_impossible_setting_is_refused_by_name(value: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(value))):
        Sampling(**value)  # type: ignore[arg-type]


def write_all(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    writer = Writer(tokenizer, stop)
    pieces = []
    for n, token in enumerate(ids):
        pieces.append(writer.write(token, last=n == len(ids) - 1))
        if writer.stopped:
            break
    return pieces, writer.stopped


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 \U0001f600!", "\ufffd at the start and the end \ufffd", ""])
def test_streamed_text_is_whole_characters_and_all_of_it(text: str, tokenizer: Tokenizer) -> None:
    pieces, _ = write_all(tokenizer, tokenizer.encode(text), [])
    assert "".join(pieces) == text
    assert all(piece in ("", *text) or piece in text for piece in pieces)


def test_half_a_character_at_the_end_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    assert "".join(write_all(tokenizer, tokenizer.encode("a漢")[:-1], [])[0]) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "written", "stopped"),
    [
        ("one two three", ["two"], "one ", True),
        ("aaab", ["aab"], "a", True),
        ("one tw", ["two"], "one tw", False),
        ("one two", ["wo", "two"], "one ", True),
        ("a漢b", ["漢"], "a", True),
        ("text", [""], "text", False),
    ],
)
def test_text_ends_before_the_first_stop_string(
    text: str, stop: list[str], written: str, stopped: bool, tokenizer: Tokenizer
) -> None:
    pieces, found = write_all(tokenizer, tokenizer.encode(text), stop)
    assert ("".join(pieces), found) == (written, stopped)


def test_an_id_beyond_the_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="encodes the prompt with id 120, but the model has only 100 ids"):
        generate(small_model(vocab_size=100), tokenizer, ["x"])


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["generate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_checkpoint_a_run_folder_and_an_exported_folder_write_the_same(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from smollm2.inference.loading import load_model

    newest = run_folder / "step_0012.pt"
    loaded, tokenizer = load_model(newest)
    tokenizer.save(tmp_path)
    write_hugging_face_folder(loaded, tmp_path)
    flags = ["--prompt", "the quick", "--max_new_tokens", "20"]
    answers = {ask(capsys, str(path), *flags)[:2] for path in (newest, run_folder, tmp_path)}
    assert len(answers) == 1
    assert next(iter(answers))[1].startswith("the quick")


def test_best_is_the_checkpoint_that_best_json_names(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = json.loads((run_folder / "best.json").read_text())["file"]
    flags = ["--prompt", "the", "--max_new_tokens", "9"]
    assert ask(capsys, str(run_folder), "--best", *flags) == ask(capsys, str(run_folder / name), *flags)


def test_json_lines_go_in_and_out_in_order(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"the quick"\n\n{"prompt": "", "id": 7}\n')
    flags = ["--prompts_file", str(file), "--samples", "2", "--max_new_tokens", "5", "--batch_size", "3"]
    code, out, _ = ask(capsys, str(run_folder), *flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["prompt"], row.get("id"), row["seed"]) for row in rows] == [
        ("the quick", None, 0),
        ("the quick", None, 1),
        ("", 7, 0),
        ("", 7, 1),
    ]
    assert all(row["end"] in ("length", "end_of_text") for row in rows)


def test_the_prompt_loop_answers_each_line(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nover the\n"))
    code, out, _ = ask(capsys, str(run_folder), "--interactive", "--max_new_tokens", "4", "--temperature", "0")
    assert code == 0
    assert out.startswith("the quick") and "\nover the" in out


COMMANDS = "\x1b]0;evil\x07\x9b2J\r"
"""To a terminal: a new title, a clear screen, the start of the line. No two bytes are equal, so a bigram model writes it."""


@pytest.fixture(scope="module")
def commanding_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model that continues `a` by COMMANDS: its blocks add nothing, its head knows what follows each byte."""
    model = small_model(vocab_size=257, hidden_size=257, num_hidden_layers=1, head_dim=16, tie_word_embeddings=False)
    ids = [*tokenizer.encode("a" + COMMANDS), tokenizer.end_of_text]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(257))
        for this, following in itertools.pairwise(ids):
            model.lm_head.weight[following, this] = 1.0
    folder = tmp_path_factory.mktemp("commanding")
    tokenizer.save(folder)
    return write_hugging_face_folder(model, folder)


@pytest.mark.parametrize("flags", [["--prompt", "a"], ["--interactive"], ["--prompt", "a", "--json"]])
def test_on_a_terminal_generated_control_characters_are_shown_and_not_obeyed(
    flags: list[str], commanding_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise G6, of text that is streamed, of the prompt loop, and of JSON Lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
        assert terminal.isatty()
        assert main(["generate", str(commanding_folder), *flags, "--temperature", "0"]) == 0
        shown = os.read(ours, 10**6).decode()
    os.close(ours)
    assert "evil" in shown
    assert not [character for character in shown.replace("\r\n", "") if not character.isprintable()]


def test_into_a_pipe_generated_text_goes_as_it_is(
    commanding_folder: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """What a program reads must be the model's text; `cat -v` shows it to a person."""
    assert main(["generate", str(commanding_folder), "--prompt", "a", "--temperature", "0"]) == 0
    assert capfdbinary.readouterr().out == f"a{COMMANDS}\n".encode()


MISTAKES = {
    "no model": (["absent.pt"], 4, "absent.pt: does not exist"),
    "a folder without a model": (["."], 4, "contains no checkpoints"),
    "no best": ([".", "--best"], 4, "best.json: not found"),
    "a cold temperature": (
        ["x.pt", "--temperature", "-1"],
        2,
        "--temperature: must be 0, or a number from 0.001 to 1000",
    ),
    "no tokens": (["x.pt", "--max_new_tokens", "0"], 2, "--max_new_tokens: must be a whole number from 1"),
    "a seed below 0": (["x.pt", "--seed", "-1"], 2, "--seed: must be a whole number from 0"),
    "a device that is not here": (
        ["x.pt", "--device", "cuda"],
        2,
        "--device: PyTorch finds no CUDA GPU on this machine",
    ),
    "two sources": (["x.pt", "--prompt", "a", "--interactive"], 2, "not allowed with"),
    "a prompts file that is absent": (["x.pt", "--prompts_file", "absent"], 3, "absent: cannot be read"),
    "a line that is no prompt": (["x.pt", "--prompts_file", "bad.jsonl"], 3, "bad.jsonl:2: is not a prompt"),
}


@pytest.mark.parametrize(("arguments", "code", "reported"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_its_exit_code(
    arguments: list[str],
    code: int,
    reported: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, error = ask(capsys, *arguments)
    assert (found, out, error.count("\n")) == (code, "", 1)
    assert reported in error


@without_bf16
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_this_cpu_only_emulates_is_refused_before_anything_is_loaded(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = ask(capsys, "absent.pt", "--precision", precision, "--device", "cpu")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"error: --precision: {precision} is not supported here: ") and error.endswith(
        "Omit this flag.\n"
    )


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly(run_folder: Path) -> None:
    command = [sys.executable, "-m", "smollm2", "generate", str(run_folder), "--max_new_tokens", "3000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert (process.wait(timeout=60), "Traceback" in error) == (0, False)
