"""The loss around the weights: what its directions are, that its centre is the model, and that nothing is changed."""

import itertools
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from runs import WORDS, metrics, tiny_config, weights, write_tiny
from torch import Tensor
from twins import blocks_of, small_model
from two_ranks import run_ranks

from smollm2 import load_model
from smollm2.analysis.landscape import (
    choose_side,
    draw_direction,
    list_points,
    measure_landscape,
    movable,
    open_source,
    position,
    read_points,
    write_points,
)
from smollm2.cli.main import main
from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.errors import Interrupted
from smollm2.inference.evaluation import evaluate_on_ranks, score_windows
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import Runtime
from smollm2.tracking.base import Landscape
from smollm2.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


def copy_of(model: SmolLM2) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def differences(model: SmolLM2, before: list[Tensor]) -> list[Tensor]:
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


def loss_of(model: SmolLM2) -> float:
    ids = torch.arange(200).view(4, 50) % 320
    with torch.no_grad():
        total, count = model(ids[:, :-1], ids[:, 1:])
    return float(total / count)


def test_each_row_of_a_direction_has_the_norm_of_its_row_of_the_weights() -> None:
    model = small_model()
    before = copy_of(model)
    with movable(model, 1) as move:
        move(1.0, 0.0)
        moved = differences(model, before)
    for weight, direction in zip(before, moved, strict=True):
        expected = weight.norm(dim=1) if weight.ndim > 1 else torch.zeros_like(weight)
        assert torch.allclose(direction.norm(dim=1) if weight.ndim > 1 else direction, expected, rtol=1e-4)


def test_norms_and_biases_stay_and_tied_weights_move_together() -> None:
    model = small_model(norm="layernorm")
    before = copy_of(model)
    with movable(model, 1) as move:
        move(0.3, -0.4)
        moved = [bool(difference.any()) for difference in differences(model, before)]
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert moved == [p.ndim > 1 for p in model.parameters()]


def test_the_two_directions_and_those_of_two_seeds_are_nearly_at_right_angles() -> None:
    matrix = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    first = torch.Generator().manual_seed(1)
    drawn = [draw_direction(matrix, generator) for generator in (first, first, torch.Generator().manual_seed(2))]
    for one, other in itertools.combinations(drawn, 2):
        assert abs((one * other).sum() / one.norm() / other.norm()) < 0.02


def test_a_row_of_zeros_stays() -> None:
    direction = draw_direction(torch.zeros(2, 3), torch.Generator().manual_seed(0))
    assert not direction.any()


def test_every_point_is_measured_once_at_its_place() -> None:
    model = small_model()
    before, measured = copy_of(model), []

    def measure_loss() -> float:
        measured.append(loss_of(model))
        return measured[-1]

    found = measure_landscape(model, measure_loss, side=5, seed=3, targets=196)
    assert len(measured) == len(list_points(5)) == 5 * 5 + 4
    assert found.line_at == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    assert found.grid_at == [-1, -0.5, 0, 0.5, 1]
    assert found.loss == found.line[4] == found.grid[2][2] == loss_of(model)
    assert [row[2] for row in found.grid] == found.line[::2]
    with movable(model, 3) as move:
        for i, j in ((0, 4), (3, 1)):
            move(found.grid_at[i], found.grid_at[j])
            assert loss_of(model) == found.grid[i][j]
    assert not any(difference.any() for difference in differences(model, before))


def test_two_seeds_give_two_landscapes_with_one_centre() -> None:
    model = small_model()
    one, other = (measure_landscape(model, lambda: loss_of(model), side=3, seed=s, targets=1) for s in (1, 2))
    assert one.loss == other.loss
    assert one.grid[0][0] != other.grid[0][0]


@pytest.mark.parametrize("stop_at", [0, 1, 7])
def test_weights_are_the_same_bits_where_it_is_interrupted(stop_at: int) -> None:
    """Promise C12."""
    model = small_model()
    with torch.no_grad():
        blocks_of(model)[0].mlp.up_proj.weight[0, :3] = torch.tensor([-0.0, 1e-42, 3e38])
    before, calls = copy_of(model), itertools.count()

    def measure_loss() -> float:
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        measure_landscape(model, measure_loss, side=3, seed=1, targets=1)
    for weight, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight.detach().view(torch.int32), kept.view(torch.int32))


@pytest.mark.parametrize(
    ("preset", "steps", "side"),
    [("nano", 1000, 9), ("micro", 1000, 9), ("nano", 330, 5), ("nano", 300, 0), ("smollm2-135m", 2000, 25)],
)
def test_a_run_affords_as_many_points_as_its_arithmetic_allows(preset: str, steps: int, side: int) -> None:
    config = load_config(preset=preset, training={"train_steps": steps})
    assert choose_side(config, "cpu-bf16", config.training.batch_size) == side
    if side:
        work = len(list_points(side)) * 8 / 3 / (config.global_batch_size * steps)
        assert work <= 0.015


def test_a_run_without_memory_for_the_copies_draws_none() -> None:
    config = Config.model_validate({"training": {"sequence_length": 128, "train_steps": 10**7}})
    assert [choose_side(config, "cuda", sequences) for sequences in (12, 1)] == [25, 0]


def config_of(folder: Path, **flags: object) -> Config:
    """The config of the run in `trained`, in `folder`."""
    quiet = {"training__eval_interval": 0, "training__sample_interval": 0, "training__log_interval": 50}
    size = {"training__train_steps": 100, "training__batch_size": 32, "training__save_interval": 90}
    return tiny_config(folder, **quiet, **size, **flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 100 steps, long enough for a landscape."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder, text=WORDS * 60)
    train(config_of(folder))
    return folder


def landscape_of(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / "landscape.json").read_text()))


def test_a_run_leaves_the_landscape_of_its_last_weights(trained: Path) -> None:
    found = landscape_of(trained / "checkpoints")
    assert (found["step"], found["seed"], len(found["grid"]), len(found["line"])) == (100, 1337, 5, 9)
    source = open_source(trained / "checkpoints" / "step_0100.pt", None, trained / "spool", "cpu", print)
    model, tokenizer = load_model(trained / "checkpoints" / "step_0100.pt")
    loss = score_windows(model, source.windows, source.indices, tokenizer.bytes_per_token, batch_size=3)
    assert found["targets"] == loss.tokens
    assert found["loss"] == pytest.approx(loss.loss, abs=1e-6)


def test_the_lowest_point_of_a_trained_model_is_its_centre(trained: Path) -> None:
    found = landscape_of(trained / "checkpoints")
    assert min(map(min, found["grid"])) == found["loss"] == min(found["line"])


def test_a_run_has_the_same_bits_without_a_landscape(trained: Path, tmp_path: Path) -> None:
    """Promise C12."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_0100.pt").unlink()
    (tmp_path / "run" / "checkpoints" / "landscape.json").unlink()
    train(config_of(tmp_path / "run", training__diagnostics_interval=0), resume="auto")
    without = weights(tmp_path / "run" / "checkpoints", 100)
    assert all(torch.equal(weight, without[name]) for name, weight in weights(trained / "checkpoints", 100).items())
    assert metrics(trained / "checkpoints") == metrics(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "checkpoints" / "landscape.json").exists()


def test_a_resumed_run_leaves_the_same_landscape(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    (run / "step_0100.pt").unlink()
    (run / "landscape.json").unlink()
    train(config_of(tmp_path / "run"), resume="auto")
    assert landscape_of(run) == landscape_of(trained / "checkpoints")


def test_a_run_that_is_stopped_within_its_landscape_is_saved_and_draws_it_when_it_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    run, calls = tmp_path / "run" / "checkpoints", itertools.count()
    (run / "step_0100.pt").unlink()
    (run / "landscape.json").unlink()

    def stopping(*arguments: Any, runtime: Runtime, **named: Any) -> object:
        if next(calls) == 20:
            runtime.stop.number = signal.SIGTERM
        return evaluate_on_ranks(*arguments, runtime=runtime, **named)

    with monkeypatch.context() as patch:
        patch.setattr("smollm2.training.actions.evaluate_on_ranks", stopping)
        with pytest.raises(Interrupted):
            train(config_of(tmp_path / "run"), resume="auto")
    assert next(calls) == 21
    stopped = weights(run, 100)
    assert all(torch.equal(weight, stopped[name]) for name, weight in weights(trained / "checkpoints", 100).items())
    assert not (run / "landscape.json").exists()
    train(config_of(tmp_path / "run"), resume="auto")
    assert landscape_of(run) == landscape_of(trained / "checkpoints")


def draw(folder: Path, *flags: str) -> int:
    return main(["landscape", str(folder / "checkpoints"), "--points", "5", *flags])


def test_the_command_draws_what_the_run_drew_and_a_page(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(trained, "--output", str(tmp_path / "out.json")) == 0
    mine, theirs = json.loads((tmp_path / "out.json").read_text()), landscape_of(trained / "checkpoints")
    assert mine.pop("grid") == [pytest.approx(row, abs=1e-5) for row in theirs.pop("grid")]
    assert mine.pop("line") == pytest.approx(theirs.pop("line"), abs=1e-5)
    assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), abs=1e-6)
    assert mine == theirs
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "plotly" in page and "<script src=" not in page
    assert "step_0100.pt: 29 points on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]


def test_a_command_that_was_stopped_continues_to_the_same_landscape(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, twice = tmp_path / "whole.json", tmp_path / "twice.json"
    assert draw(trained, "--output", str(whole)) == 0
    calls = itertools.count()

    def stopping(*arguments: Any, **named: Any) -> object:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return score_windows(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("smollm2.analysis.landscape.score_windows", stopping)
        assert draw(trained, "--output", str(twice)) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not twice.exists()
    calls = itertools.count(100)
    assert draw(trained, "--output", str(twice)) == 0
    assert "12 of them measured earlier" in capsys.readouterr().err
    assert twice.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_without_memory_for_its_landscape_reports_it_and_finishes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_0100.pt").unlink()
    calls = itertools.count()

    def without_memory(*arguments: Any, **named: Any) -> object:
        if next(calls) == 5:
            raise torch.OutOfMemoryError
        return evaluate_on_ranks(*arguments, **named)

    monkeypatch.setattr("smollm2.training.actions.evaluate_on_ranks", without_memory)
    assert train(config_of(tmp_path / "run"), resume="auto").step == 100
    assert "skipped the loss landscape (OutOfMemoryError" in capsys.readouterr().out
    left = weights(tmp_path / "run" / "checkpoints", 100)
    assert all(torch.equal(weight, left[name]) for name, weight in weights(trained / "checkpoints", 100).items())


def test_points_of_another_landscape_are_not_taken(tmp_path: Path) -> None:
    path, of = tmp_path / "x.partial", {"seed": 1}
    write_points(path, of, {(0, 1): 2.5, (4, 4): math.inf})
    assert read_points(path, of) == {(0, 1): 2.5, (4, 4): math.inf}
    assert read_points(path, {"seed": 2}) == {}
    path.write_bytes(path.read_bytes()[:-5])
    assert read_points(path, of) == {}


def test_positions_reach_from_minus_one_to_one() -> None:
    assert [position(index, 3) for index in range(5)] == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--points", "6"], "--points: must be odd (got 6)"),
        (["--points", "1"], "--points: must be a whole number from 3 to 401 (got '1')"),
        (["--seed", "-1"], "--seed: must be a whole number from 0"),
        (["--output", "."], "--output: must name a file (got '.')"),
    ],
)
def test_an_impossible_flag_is_one_line(
    flags: list[str], reported: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(trained, *flags) == 2
    assert reported in capsys.readouterr().err


def test_another_text_is_tokenized_and_nothing_is_left_of_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("nothing of the kind. " * 100)
    assert draw(trained, "--input_file", "other.txt", "--output", "other.page") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "other.json", "other.txt"]
    assert landscape_of(trained / "checkpoints")["loss"] != json.loads((tmp_path / "other.json").read_text())["loss"]


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["landscape", str(tmp_path)]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU")
def test_two_ranks_measure_the_landscape_of_one(trained: Path, tmp_path: Path) -> None:
    """Resumed from step 90 by two processes, whose weights differ by rounding."""
    shutil.copytree(trained, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    (run / "step_0100.pt").unlink()
    words = ["--train_steps", "100", "--training.batch_size", "32", "--training.eval_interval", "0"]
    command = ["train", "--config", "config.yaml", *words, "--resume", "auto"]
    ended = run_ranks(lambda rank: main(command), tmp_path / "run")
    assert [rank.code for rank in ended] == [0, 0], ended
    mine, theirs = Landscape(**without_step(landscape_of(run))), landscape_of(trained / "checkpoints")
    assert mine.line == pytest.approx(theirs["line"], rel=1e-2)
    assert mine.targets == theirs["targets"]


def without_step(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}
