"""A resumed run is bit-identical to one that was not interrupted; what cannot be resumed is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, WORDS, metrics, outcome, tiny_config, write_tiny
from twins import needs_bf16

from smollm2.errors import CheckpointError, ConfigError, Smollm2Error
from smollm2.training import resume
from smollm2.training.loop import train


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run of 12 steps and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_tiny(folder)
    train(tiny_config(folder, training__save_interval=1))
    return folder


def resumed(source: Path, folder: Path, steps: list[int], **flags: object) -> Path:
    """A copy of the run at `steps[0]`, resumed; at each later one it is cut back to that step and resumed again."""
    flags = {"training__save_interval": 1, **flags}
    shutil.copytree(source, folder)
    run = folder / "checkpoints"
    for step in steps:
        for path in run.glob("step_*.pt"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        train(tiny_config(folder, **flags), resume="auto")
    return run


@pytest.mark.parametrize(
    "steps",
    [[1], [5], [11], [4, 5], [6, 7, 8]],
    ids=["first step", "an evaluation", "last but one", "straight after a resume", "three times"],
)
def test_a_resumed_run_ends_with_the_same_bits(uninterrupted: Path, tmp_path: Path, steps: list[int]) -> None:
    run = resumed(uninterrupted, tmp_path / "run", steps)
    assert outcome(run, 12) == outcome(uninterrupted / "checkpoints", 12)


Mixed = tuple[Path, dict[str, object]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """A folder with a finished run on a mixture of two texts, whose second stage begins at step 6, and its flags."""
    folder = tmp_path_factory.mktemp("mixed")
    write_tiny(folder)
    (folder / "other.txt").write_text("another text, of which a quarter of the windows is drawn at first. " * 30)
    weights = f"{{{folder}/input.txt: [0.75, 0.25], {folder}/other.txt: [0.25, 0.75]}}"
    flags: dict[str, object] = {"data__input": "input.txt", "data__mixture": weights, "data__stages": "[6]"}
    train(tiny_config(folder, training__save_interval=1, **flags))
    return folder, flags


@pytest.mark.parametrize("steps", [[5], [6], [4, 7]], ids=["before a stage", "at its border", "on both sides"])
def test_a_mixture_is_resumed_across_the_border_of_a_stage_with_the_same_bits(
    mixed: Mixed, tmp_path: Path, steps: list[int]
) -> None:
    whole, flags = mixed
    run = resumed(whole, tmp_path / "run", steps, **flags)
    assert outcome(run, 12) == outcome(whole / "checkpoints", 12)


def test_a_run_that_isolates_documents_falls_and_resumes_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [WORDS[start : start + 20 + 7 * start] for start in range(40)]  # of 0 to 3 windows
    write_tiny(tmp_path / "whole", text="\f".join(texts * 3))
    isolated: dict[str, object] = {"data__document_separator": "\f", "data__document_mask": "true"}
    isolated |= {"training__train_steps": 20, "training__save_interval": 7}
    train(tiny_config(tmp_path / "whole", **isolated))
    assert "windows of 32 tokens, documents isolated" in capsys.readouterr().out
    rows = metrics(tmp_path / "whole" / "checkpoints")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert 200 < rows[0]["tokens"] < 8 * 32  # the first token of each document is no target
    run = resumed(tmp_path / "whole", tmp_path / "resumed", [7, 14], **isolated)
    assert outcome(run, 20) == outcome(tmp_path / "whole" / "checkpoints", 20)


def test_an_explicit_checkpoint_into_another_folder_begins_its_rows_after_its_step(
    uninterrupted: Path, tmp_path: Path
) -> None:
    config = tiny_config(uninterrupted, training__save_dir=tmp_path / "other", training__save_interval=1)
    train(config, checkpoint_path=uninterrupted / "checkpoints" / "step_0007.pt")
    expected_hash, rows = outcome(uninterrupted / "checkpoints", 12)
    assert outcome(tmp_path / "other", 12) == (expected_hash, [row for row in rows if row["step"] > 7])


def test_checkpoints_after_the_resumed_step_are_moved_to_superseded(uninterrupted: Path, tmp_path: Path) -> None:
    """Else `--resume auto` would find them after a kill."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    changed = tiny_config(tmp_path / "run", training__learning_rate=1e-3, training__save_interval=0)
    train(changed, checkpoint_path=run / "step_0007.pt")
    assert [path.name for path in sorted(run.glob("step_*.pt"))][-2:] == ["step_0007.pt", "step_0012.pt"]
    assert (run / "superseded" / "step_0008.pt").exists()


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run folder but the log."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("run.log", ".lock"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("flags", "refused"),
    [({"training__train_steps": 6}, False), ({"training__train_steps": 5}, True), ({"training__seed": 2}, True)],
    ids=["nothing left to do", "fewer steps than are done", "another run"],
)
def test_a_start_that_makes_no_step_changes_nothing_in_the_run_folder(
    uninterrupted: Path, tmp_path: Path, flags: dict[str, object], refused: bool
) -> None:
    """Promise E3: rows that were cut for a run that then does not begin would be missing for ever."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    before = contents(run)
    with pytest.raises(Smollm2Error) if refused else contextlib.nullcontext():
        train(tiny_config(tmp_path / "run", **flags), checkpoint_path=run / "step_0006.pt")
    assert contents(run) == before


def test_a_checkpoint_is_not_resumed_into_a_folder_that_holds_another_run(uninterrupted: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__train_steps=4))
    run, theirs = tmp_path / "checkpoints", uninterrupted / "checkpoints" / "step_0002.pt"
    before = contents(run)
    with pytest.raises(CheckpointError) as raised:
        train(tiny_config(uninterrupted, training__save_dir=run), checkpoint_path=theirs)
    assert str(theirs) in str(raised.value)
    assert f"in {run}" in str(raised.value)
    assert contents(run) == before


def test_an_older_checkpoint_of_its_own_folder_is_resumed_through_a_link_to_the_folder(
    uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoints")
    config = tiny_config(tmp_path / "run", training__save_dir=tmp_path / "link")
    assert train(config, checkpoint_path=tmp_path / "run" / "checkpoints" / "step_0010.pt").step == 12


def best(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "best.json").read_text())
    return found


def test_the_best_checkpoint_after_a_rollback_is_the_best_of_those_that_are_left(
    uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    worse = tiny_config(tmp_path / "run", training__learning_rate=5, training__save_interval=1)
    train(worse, checkpoint_path=run / "step_0007.pt")
    losses = {row["step"]: row["validation_loss"] for row in metrics(run) if "validation_loss" in row}
    assert best(run) == {"file": "step_0005.pt", "step": 5, "validation_loss": losses[5], "windows": 8}


def test_the_last_validation_reads_the_whole_split_and_the_best_is_compared_over_the_same_windows(
    uninterrupted: Path,
) -> None:
    run = uninterrupted / "checkpoints"
    rows = [row for row in metrics(run) if "validation_loss" in row]
    assert [row["validation_windows"] for row in rows] == [8, 8, 12]
    assert best(run)["windows"] == 8
    assert best(run)["validation_loss"] not in {rows[-1]["validation_loss"]}


def test_another_number_of_validation_windows_starts_a_new_comparison(uninterrupted: Path, tmp_path: Path) -> None:
    run = resumed(uninterrupted, tmp_path / "run", [7], training__eval_windows=2, training__learning_rate=5)
    assert best(run)["windows"] == 2


def test_a_second_rollback_keeps_the_checkpoints_that_the_first_one_moved(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = tmp_path / "run" / "checkpoints"
    for _ in range(2):
        train(tiny_config(tmp_path / "run"), checkpoint_path=run / "step_0011.pt")
    assert sorted(path.name for path in (run / "superseded").iterdir()) == ["step_0012-2.pt", "step_0012.pt"]


def test_another_order_of_the_batches_is_reported(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resume, "ORDER_VERSION", 2)
    resumed(uninterrupted, tmp_path / "run", [11])
    assert "order of the batches: version 1 -> 2; from here on the run is not bit-identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "device", "deterministic", "reported"),
    [
        ([], "cpu", False, "bit-exact"),
        ([], "cuda", True, "bit-exact"),
        ([], "cuda", False, "equal up to rounding, because some GPU kernels add in a varying order"),
        (["threads 1 -> 2"], "cuda", True, "not bit-exact, because of threads 1 -> 2"),
    ],
)
def test_a_resume_is_called_bit_exact_only_if_it_is(
    changed: list[str], device: str, deterministic: bool, reported: str
) -> None:
    assert resume.describe_exactness(changed, device, deterministic=deterministic).startswith(reported)


@pytest.mark.parametrize("name", [".", "run", "a/..", "run/"])
def test_a_free_folder_has_a_name_whatever_the_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    free = resume.free_folder(Path(name))
    assert free.name.endswith("-2") and not free.exists()


def test_a_finished_run_has_nothing_to_do(uninterrupted: Path, tmp_path: Path) -> None:
    before = metrics(uninterrupted / "checkpoints")
    run = resumed(uninterrupted, tmp_path / "run", [12])
    assert metrics(run) == before


def test_a_finished_run_continues_if_more_steps_are_requested(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resumed(uninterrupted, tmp_path / "run", [12], training__train_steps=14)
    assert metrics(run)[-1]["step"] == 14
    assert "training.train_steps: 12 -> 14" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "error", "reported"),
    [
        ({"training__train_steps": 6}, ConfigError, "training.train_steps: 6 is less than the 12"),
        ({"model__hidden_size": 64}, CheckpointError, "model.hidden_size 32 -> 64"),
        ({"training__seed": 2}, CheckpointError, "training.seed 1337 -> 2"),
        ({"training__batch_size": 5}, CheckpointError, "training.batch_size 4 -> 5"),
        ({"data__validation_fraction": 0.2}, CheckpointError, "data.validation_fraction 0.1 -> 0.2"),
    ],
)
def test_another_run_is_refused_with_what_differs(
    uninterrupted: Path, tmp_path: Path, flags: dict[str, object], error: type[Smollm2Error], reported: str
) -> None:
    with pytest.raises(error, match=reported):
        resumed(uninterrupted, tmp_path / "run", [12], **flags)


def test_another_text_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "input.txt").write_text(WORDS * 41)
    with pytest.raises(CheckpointError, match=r"data\.input is a different text"):
        train(tiny_config(tmp_path / "run"), resume="auto")


def test_another_micro_batch_size_resumes_and_reports_that_bits_may_differ(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"training__batch_size": 8, "training__gradient_accumulation_steps": 1}
    run = resumed(uninterrupted, tmp_path / "run", [6], **flags)
    assert "training.batch_size: 4 -> 8" in capsys.readouterr().out
    theirs = metrics(uninterrupted / "checkpoints")
    for mine, row in zip(metrics(run), theirs, strict=True):
        assert mine == pytest.approx(row, rel=1e-3)


def test_a_folder_that_holds_checkpoints_is_not_trained_over(uninterrupted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume auto.*--save_dir .*checkpoints-2"):
        train(tiny_config(uninterrupted))


def test_resume_auto_in_an_empty_folder_starts_at_zero(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    assert train(tiny_config(tmp_path, training__train_steps=1), resume="auto").step == 1


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step_0012.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    train(tiny_config(tmp_path / "run", training__save_interval=1), resume="auto")
    assert "step_0012.pt" in (out := capsys.readouterr().out)
    assert "after step 11" in out
    assert outcome(tmp_path / "run" / "checkpoints", 12) == outcome(uninterrupted / "checkpoints", 12)


def test_a_checkpoint_of_torchs_muon_resumes_and_one_line_reports_the_other_arithmetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__optimizer="muon"))
    path = tmp_path / "checkpoints" / "step_0008.pt"
    state = torch.load(path, weights_only=True)
    del state["optimizer"]["muon"]["arithmetic"]
    torch.save(state, path)
    capsys.readouterr()
    config = tiny_config(tmp_path, "again", training__optimizer="muon")
    assert train(config, checkpoint_path=path).step == 12
    lines = [line for line in capsys.readouterr().out.splitlines() if "arithmetic (muon, version 1 -> 2)" in line]
    assert len(lines) == 1
    assert "not bit-exact" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=needs_bf16)])
def test_the_users_commands_resume_bit_for_bit_on_shakespeare(
    shakespeare: Path, tmp_path: Path, precision: str, optimizer: str
) -> None:
    """From an epoch's end, straight after a resume, in between, and after kill -9: always the same --train_steps."""
    text = shakespeare.read_text(encoding="utf-8")[:250_000]
    nano = (ROOT / "configs" / "nano.yaml").read_text(encoding="utf-8")
    write_tiny(tmp_path, text=text, config=nano)
    flags = ["--training.precision", precision, "--training.optimizer", optimizer]
    flags += ["--training.log_interval", "1", "--training.eval_interval", "20", "--training.sample_interval", "30"]
    flags += ["--training.save_interval", "10", "--training.eval_windows", "8"]

    def command(save_dir: str, *more: str) -> list[str]:
        words = ["--config", "config.yaml", "--input_file", "input.txt", "--train_steps", "60", "--disable_wandb"]
        return [sys.executable, str(ROOT / "train.py"), *words, "--save_dir", save_dir, *flags, *more]

    def run(save_dir: str, *more: str) -> Path:
        subprocess.run(command(save_dir, *more), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        return tmp_path / save_dir

    whole = run("checkpoints")
    expected_hash, rows = outcome(whole, 60)
    epoch = next(r["step"] for r in rows if r.get("epoch", 0) >= 1)
    assert 10 < epoch < 60, "the text is short enough for an epoch to end inside the run"
    nearest = epoch // 10 * 10
    for step in {nearest, 30}:
        again = run(f"from-{step}", "--checkpoint_path", f"checkpoints/step_{step:04d}.pt")
        assert outcome(again, 60) == (expected_hash, [row for row in rows if row["step"] > step])
    once_more = run("twice", "--checkpoint_path", "from-30/step_0040.pt")
    assert outcome(once_more, 60) == (expected_hash, [row for row in rows if row["step"] > 40])

    process = subprocess.Popen(command("killed"), cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "step_0020.pt").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert outcome(run("killed", "--resume", "auto"), 60) == (expected_hash, rows)
