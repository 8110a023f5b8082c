"""Diagnostics equal a plain computation of the same values, and leave the run bit-identical."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from runs import metrics, tiny_config, weights, write_tiny
from torch import Tensor
from twins import blocks_of, small_model
from two_ranks import run_ranks

from smollm2.analysis import diagnostics
from smollm2.analysis.diagnostics import StepDiagnostics, make_histograms, measure_activations
from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.cli.main import main
from smollm2.config.schema import TrainingConfig
from smollm2.errors import CheckpointError
from smollm2.model.functional import rotate
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import Runtime, start_runtime
from smollm2.tracking.base import Fanout
from smollm2.training.loop import train
from smollm2.training.optim import build_optimizers
from smollm2.training.step import StepResult, accumulate_gradients, train_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(TrainingConfig(precision="float32"))


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(0, 320, (8, 25), generator=torch.Generator().manual_seed(0))
    return [(ids[:4, :-1], ids[:4, 1:]), (ids[4:, :-1], ids[4:, 1:])]


def step_with_diagnostics(
    runtime: Runtime, model: SmolLM2, *, histograms: bool = False
) -> tuple[StepDiagnostics, StepResult]:
    optimizers = build_optimizers(model, TrainingConfig(optimizer="muon"))
    diagnostics = StepDiagnostics(model, contextlib.nullcontext, histograms=histograms)
    result = train_step(
        model, optimizers, micro_batches(), runtime, learning_rate=0.01, max_grad_norm=0.1, diagnostics=diagnostics
    )
    return diagnostics, result


def test_the_norms_are_those_of_a_loop_over_the_parameters(runtime: Runtime) -> None:
    """Gradients as they were before clipping, weights as the update left them."""
    twin, model = small_model(), small_model()
    accumulate_gradients(twin, micro_batches(), runtime)
    diagnostics, result = step_with_diagnostics(runtime, model)
    assert result.clipped
    found = diagnostics.diagnosis
    assert list(found.gradient_norms) == [name for name, _ in model.named_parameters()]
    for (name, before), after in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert found.gradient_norms[name] == pytest.approx(cast(Tensor, before.grad).double().norm().item(), rel=1e-6)
        assert found.weight_norms[name] == pytest.approx(after.double().norm().item(), rel=1e-6)
        moved = (after.double() - before.double()).norm() / after.double().norm()
        assert found.update_ratios[name] == pytest.approx(moved.item(), rel=1e-4)
    assert math.hypot(*found.gradient_norms.values()) == pytest.approx(result.grad_norm, rel=1e-6)


def test_a_skipped_step_has_its_diagnostics_too(runtime: Runtime) -> None:
    model = small_model()
    weight = blocks_of(model)[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    diagnostics, result = step_with_diagnostics(runtime, model, histograms=True)
    assert result.skipped
    bad = "model.layers.1.mlp.up_proj.weight"
    assert [name for name, norm in diagnostics.diagnosis.gradient_norms.items() if not math.isfinite(norm)] == [bad]
    assert set(diagnostics.diagnosis.update_ratios.values()) == {0.0}
    assert bad not in diagnostics.diagnosis.gradient_histograms


def test_a_frozen_parameter_has_a_gradient_and_an_update_of_0(runtime: Runtime) -> None:
    model = small_model()
    model.model.norm.weight.requires_grad_(False)
    diagnosis = step_with_diagnostics(runtime, model, histograms=True)[0].diagnosis
    assert diagnosis.gradient_norms["model.norm.weight"] == diagnosis.update_ratios["model.norm.weight"] == 0
    assert [name for name, ratio in diagnosis.update_ratios.items() if ratio == 0] == ["model.norm.weight"]


def test_diagnostics_hold_no_copy_afterwards(runtime: Runtime) -> None:
    diagnostics, _ = step_with_diagnostics(runtime, small_model())
    assert diagnostics.before == []


def test_the_time_of_diagnostics_is_counted(runtime: Runtime) -> None:
    model, tracker = small_model(), Fanout([])
    accumulate_gradients(model, micro_batches(), runtime)
    with StepDiagnostics(model, tracker.counted, histograms=False):
        entered = tracker.seconds
    assert 0 < entered < tracker.seconds


def read_plainly(model: SmolLM2, input_ids: Tensor) -> dict[str, dict[str, float]]:
    """The readings by the definitions, each (T, T) matrix whole, in float64."""
    model = model.double()
    inner, length = model.model, input_ids.shape[1]
    cos, sin = (table[:length].double() for table in (inner.rotary.cos, inner.rotary.sin))
    found: dict[str, dict[str, float]] = {}
    x = inner.embed_tokens(input_ids)
    for number, layer in enumerate(blocks_of(model)):
        normed = layer.input_layernorm(x)
        heads = (*normed.shape[:2], -1, layer.self_attn.head_dim)
        q = rotate(layer.self_attn.q_proj(normed).view(heads), cos, sin).transpose(1, 2)
        k = rotate(layer.self_attn.k_proj(normed).view(heads), cos, sin).transpose(1, 2)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / math.sqrt(heads[-1])
        seen = torch.ones(length, length).tril().bool()
        x = x + layer.self_attn(normed, cos, sin)
        normed = layer.post_attention_layernorm(x)
        hidden = torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        quiet = hidden.abs().amax((0, 1)) <= 1e-3 * hidden.pow(2).mean().sqrt()
        x = x + layer.mlp(normed)
        found[f"model.layers.{number}"] = {
            "rms": x.pow(2).mean().sqrt().item(),
            "max_abs": x.abs().max().item(),
            "max_attention_logit": scores[:, :, seen].max().item(),
            "dead_units": quiet.double().mean().item(),
        }
    return found


@pytest.mark.parametrize("held_at_once", [2**24, 300])
def test_the_activations_are_those_of_the_definitions(held_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "SCORES", held_at_once)
    model, input_ids = small_model(), micro_batches()[0][0]
    with torch.no_grad():
        blocks_of(model)[1].mlp.gate_proj.weight[:16] = 0
    found = measure_activations(model, input_ids)
    with torch.no_grad():
        expected = read_plainly(model, input_ids)
    assert found.keys() == expected.keys()
    for name, readings in expected.items():
        assert found[name] == pytest.approx(readings, rel=1e-5)
    assert found["model.layers.1"]["dead_units"] == pytest.approx(16 / 160)


def hooks_of(model: SmolLM2) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left() -> None:
    model = small_model()
    measure_activations(model, micro_batches()[0][0])
    assert hooks_of(model) == 0


def test_no_hook_is_left_where_the_pass_fails() -> None:
    model = small_model()
    with pytest.raises(IndexError):
        measure_activations(model, torch.full((1, 3), 10_000))
    assert hooks_of(model) == 0


def test_compiled_blocks_are_read_and_not_compiled_again() -> None:
    """With dynamo alone, which is what a hook would set off; the compiler behind it takes a minute."""
    model, input_ids = small_model(num_hidden_layers=1), micro_batches()[0][0]
    plain = measure_activations(model, input_ids)
    model.model.layers[0].compile(backend="eager")
    model(input_ids)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    assert measure_activations(model, input_ids) == plain
    model(input_ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_a_histogram_counts_every_number_once() -> None:
    tensor = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    found = make_histograms({"a": tensor, "flat": torch.ones(7), "odd": torch.tensor([1.0, math.inf])})
    counts, edges = np.histogram(tensor.numpy(), 64)
    assert found.keys() == {"a", "flat"}
    assert np.abs(np.array(found["a"].counts) - counts).sum() <= 4  # numbers on an edge
    assert found["a"].edges == pytest.approx(edges.tolist(), abs=1e-6)
    assert [sum(histogram.counts) for histogram in found.values()] == [3000, 7]


def test_a_histogram_counts_beyond_what_float32_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, each of which float32 can count."""
    monkeypatch.setattr(diagnostics, "COUNTABLE", 100)
    assert sum(make_histograms({"a": torch.arange(1001.0)})["a"].counts) == 1001


def diagnoses(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps that was looked into every 5, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("looked")
    write_tiny(folder)
    train(tiny_config(folder, training__save_interval=1, training__diagnostics_interval=5))
    return folder


def test_diagnostics_are_due_at_multiples_of_their_interval_and_at_the_last_step(looked: Path) -> None:
    rows = diagnoses(looked / "checkpoints")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert rows[0].keys() >= {"gradient_norms", "weight_norms", "update_ratios", "activations", "clipped"}


def test_a_run_is_bit_identical_without_diagnostics(looked: Path, tmp_path: Path) -> None:
    """Promise C11."""
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__diagnostics_interval=0))
    with_looks, without = looked / "checkpoints", tmp_path / "checkpoints"
    assert metrics(with_looks) == metrics(without)
    theirs = weights(without)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights(with_looks).items())
    assert diagnoses(without) == []


@pytest.mark.parametrize("step", [3, 5, 11])
def test_a_resumed_run_has_the_same_diagnostics(step: int, looked: Path, tmp_path: Path) -> None:
    """The share of clipped updates among it, which is counted since the diagnostics before."""
    shutil.copytree(looked, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    for path in run.glob("step_*.pt"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    train(tiny_config(tmp_path / "run", training__diagnostics_interval=5), resume="auto")
    expected = (looked / "checkpoints" / "diagnostics.jsonl").read_bytes()
    assert (run / "diagnostics.jsonl").read_bytes() == expected


def test_the_share_of_clipped_steps_is_that_of_the_reported_norms(looked: Path) -> None:
    norms = {row["step"]: row["grad_norm"] for row in metrics(looked / "checkpoints") if "loss" in row}
    clipped = [float(norms[step] > 1.0) for step in range(1, 13)]
    expected = [sum(part) / len(part) for part in (clipped[:5], clipped[5:10], clipped[10:])]
    assert 0 < sum(clipped) < 12
    assert [row["clipped"] for row in diagnoses(looked / "checkpoints")] == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_from_before_clipped_updates_were_counted_is_read(looked: Path, tmp_path: Path) -> None:
    shutil.copytree(looked, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_0011.pt"
    state = torch.load(path, weights_only=True)
    del state["stability"]["clipped"]
    torch.save(state, path)
    train(tiny_config(tmp_path / "run", training__diagnostics_interval=5), checkpoint_path=path)
    assert diagnoses(path.parent)[-1]["step"] == 12


def test_a_count_of_clipped_updates_of_another_type_is_refused(looked: Path, tmp_path: Path) -> None:
    state = torch.load(looked / "checkpoints" / "step_0011.pt", weights_only=True)
    state["stability"]["clipped"] = "many"
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"stability\.clipped is of type str, but must be a list"):
        load_checkpoint(tmp_path / "odd.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU")
def test_of_two_ranks_one_runs_diagnostics_and_none_waits(looked: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    words = ["train", "--config", "config.yaml", "--training.diagnostics_interval", "5"]
    ended = run_ranks(lambda rank: main(words), tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    for mine, theirs in zip(diagnoses(tmp_path / "checkpoints"), diagnoses(looked / "checkpoints"), strict=True):
        assert mine["gradient_norms"] == pytest.approx(theirs["gradient_norms"], rel=1e-2)
        assert mine["activations"].keys() == theirs["activations"].keys()
