"""A whole run: what it leaves behind, that it learns, and how it meets trouble."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ROOT, WORDS, metrics, tiny_config, write_tiny

from smollm2 import evaluate, generate, load_model
from smollm2.cli.main import main
from smollm2.config.reading import load_config
from smollm2.config.schema import TrainingConfig
from smollm2.data.windows import Batch
from smollm2.errors import ResourceError, TrainingError
from smollm2.runtime.device import start_runtime
from smollm2.training import actions
from smollm2.training.loop import train
from smollm2.training.optim import learning_rate_at
from smollm2.training.pages import describe_warmup
from smollm2.training.step import split


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 60 steps on a text that repeats."""
    folder = tmp_path_factory.mktemp("run")
    config, run = write_tiny(folder, text=WORDS * 200), folder / "checkpoints"
    flags = ["--config", str(config), "--input_file", str(folder / "input.txt"), "--save_dir", str(run)]
    assert main(["train", *flags, "--train_steps", "60"]) == 0
    return run


def rows(run: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def test_the_run_folder_holds_what_the_readme_draws(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.log", "latest.json", "best.json", "tokenizer", "metrics.jsonl"} <= names
    assert {"events.jsonl", "samples.jsonl", "step_0004.pt", "step_0060.pt"} <= names


def test_the_loss_falls(run: Path) -> None:
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]


def test_the_reported_rate_is_the_formula_at_every_step(run: Path) -> None:
    config = load_config(run / "config.yaml").training
    reported = [(row["step"], row["learning_rate"]) for row in metrics(run) if "loss" in row]
    assert [step for step, _ in reported] == list(range(1, 61))
    assert [rate for _, rate in reported] == [learning_rate_at(step - 1, config) for step, _ in reported]


def test_validation_covers_the_whole_split_at_the_end(run: Path, tmp_path: Path) -> None:
    validations = [row["step"] for row in metrics(run) if "validation_loss" in row]
    assert validations == [*range(5, 61, 5)]
    model, tokenizer = load_model(run / "step_0060.pt")
    text = (run.parent / "input.txt").read_text(encoding="utf-8")
    tail = evaluate(model, tokenizer, text[-len(text) // 10 :])
    assert metrics(run)[-1]["validation_loss"] == pytest.approx(tail["loss"], abs=0.1)


def test_samples_come_from_each_prompt_and_from_none(run: Path) -> None:
    samples = rows(run, "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples[:4]] == [(6, "a"), (6, ""), (12, "a"), (12, "")]


def test_a_checkpoint_has_the_users_five_entries_and_works_alone(run: Path, tmp_path: Path) -> None:
    alone = shutil.copy(run / "step_0060.pt", tmp_path / "model.pt")
    state = torch.load(alone, weights_only=True)
    assert {"model", "optimizer", "scheduler", "step", "loss"} <= state.keys()
    model, tokenizer = load_model(alone)
    assert generate(model, tokenizer, ["the quick"], max_new_tokens=10, temperature=0)[0].strip()


def test_the_effective_config_names_the_origin_of_each_value(run: Path) -> None:
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert "train_steps: 60  # --train_steps" in text
    assert "vocab_size: 257  # the tokenizer" in text
    assert "weight_decay: 0.01  # default" in text


def test_tokens_per_step_are_those_of_the_batch(run: Path) -> None:
    first = metrics(run)[0]
    assert first["tokens"] == 8 * 32


@pytest.mark.parametrize("isolates", [False, True])
def test_a_batch_is_cut_into_micro_batches_with_all_that_the_model_takes(isolates: bool) -> None:
    ids = np.arange(24).reshape(4, 6)
    batch = Batch(ids, ids + 1, ids // 3 if isolates else None)
    parts = split(batch, 2, start_runtime(TrainingConfig(precision="float32")))
    given = [array for array in batch if array is not None]
    assert [len(part) for part in parts] == [len(given)] * 2
    for column, array in zip(zip(*parts, strict=True), given, strict=True):
        assert torch.equal(torch.cat(column), torch.from_numpy(array))


def test_a_batch_that_no_size_divides_is_cut_into_nearly_equal_micro_batches() -> None:
    ids = np.arange(13 * 4).reshape(13, 4)
    parts = split(Batch(ids, ids + 1), 12, start_runtime(TrainingConfig(precision="float32")))
    assert [len(part[0]) for part in parts] == [7, 6]


def test_a_quiet_run_prints_nothing_calls_back_after_each_step_and_returns_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    seen: list[tuple[int, float]] = []
    result = train(tiny_config(tmp_path), quiet=True, on_step=lambda step, r: seen.append((step, r.loss)))
    assert capsys.readouterr().out == ""
    assert [step for step, _ in seen] == [*range(1, 13)]
    assert result.loss == seen[-1][1]
    assert result.checkpoint_path == tmp_path / "checkpoints" / "step_0012.pt" and result.checkpoint_path.exists()


def test_a_run_without_validation_text_reports_it_and_logs_no_number_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, text="hi")
    train(tiny_config(tmp_path, training__train_steps=5))
    shown = capsys.readouterr().out
    assert re.search(r"validation +none, because the text is too short", shown)
    assert "nan" not in shown and "validation_bpb" not in shown and "best validation loss" not in shown
    assert not [row for row in metrics(tmp_path / "checkpoints") if None in row.values() or "validation_loss" in row]


def test_no_two_prompts_of_a_round_are_drawn_with_the_same_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    seeds: list[int] = []

    def draw(*arguments: object, seed: int, **rest: object) -> list[str]:
        seeds.append(seed)
        return [""]

    monkeypatch.setattr(actions, "generate", draw)
    train(tiny_config(tmp_path, training__sample_prompts="[a, b, a]"))
    assert len(seeds) == 2 * 4 == len(set(seeds))


@pytest.mark.parametrize(
    ("steps", "reported"),
    [
        (100, "reaches 0.01 of 0.01 at its end"),
        (40, "reaches 0.004 of 0.01 at its end and never decays. Set it to 4"),
        (101, ""),
    ],
)
def test_a_warmup_that_takes_the_whole_run_is_reported_with_the_rate_that_is_reached(steps: int, reported: str) -> None:
    config = TrainingConfig(train_steps=steps, warmup_steps=100, learning_rate=1e-2)
    message = describe_warmup(config)
    assert reported in message if reported else not message


def test_a_run_whose_checkpoints_do_not_fit_is_refused_with_the_number_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8_000_000))
    with pytest.raises(
        ResourceError, match=r"12 checkpoints need .*, but only .* is free. Set training.keep_last to \d+"
    ):
        train(tiny_config(tmp_path, training__save_interval=1, model__hidden_size=64))


def test_a_backend_that_mixes_documents_stops_the_run_before_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path, text="\f".join([WORDS] * 40))
    real = F.scaled_dot_product_attention
    leaking = lambda q, k, v, mask, is_causal, **rest: real(q, k, v, is_causal=True, **rest)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", leaking)
    isolated = {"data__document_separator": "\f", "data__document_mask": "true"}
    with pytest.raises(TrainingError, match=r"sdpa differs from the reference.*. Set it to eager"):
        train(tiny_config(tmp_path, **isolated))


def test_weights_that_break_stop_the_run_after_ten_skips(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = tiny_config(tmp_path, training__learning_rate=10, training__optimizer="adamw", training__train_steps=400)
    hot = config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(TrainingError, match=r"10 steps in a row .* run was saved at this step.*run\.log"):
        train(hot)


@pytest.mark.slow
def test_the_users_own_config_makes_two_steps_here(tmp_path: Path) -> None:
    """137 million parameters; the sequence is shortened, and the vocabulary is what the text supports."""
    shutil.copy(ROOT / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / "input.txt").write_text(WORDS * 400, encoding="utf-8")
    flags = {"training__train_steps": 2, "training__sequence_length": 64, "training__sample_tokens": 4}
    progress = train(tiny_config(tmp_path, wandb__enabled="false", **flags))
    first, second = (row["loss"] for row in metrics(tmp_path / "checkpoints") if "loss" in row)
    assert progress.step == 2
    assert second < first
