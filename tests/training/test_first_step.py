"""The first step after a resume is compared with the same step of the run before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import tiny_config, write_tiny

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.saving import save_checkpoint
from smollm2.training.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run of 12 steps, saved after the steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    write_tiny(folder)
    train(tiny_config(folder))
    return folder


def line_of_resume(folder: Path, **flags: object) -> str:
    """Resume the run in `folder`, and return the line that it reported about its first step."""
    train(tiny_config(folder, **flags), resume="auto")
    rows = [json.loads(line) for line in (folder / "checkpoints" / "events.jsonl").read_text().splitlines()]
    (line,) = [row["message"] for row in rows if row["kind"] == "first_step"]
    return str(line)


def cut_back(source: Path, folder: Path) -> Path:
    """A copy of the run as a kill after step 8 would have left it; return its checkpoint of step 8."""
    shutil.copytree(source, folder)
    (folder / "checkpoints" / "step_0012.pt").unlink()
    return folder / "checkpoints" / "step_0008.pt"


def record_of(checkpoint: Path) -> Path:
    return checkpoint.with_name("step_0008.next.json")


def test_a_resumed_run_proves_its_first_step_bit_exact(finished: Path, tmp_path: Path) -> None:
    cut_back(finished, tmp_path / "run")
    rows = [json.loads(line) for line in (finished / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 9 and "grad_norm" in row]
    assert line_of_resume(tmp_path / "run") == (
        f"resume: step 9 is bit-exact with the run before (loss {row['loss']:.10g}, "
        f"gradient norm {row['grad_norm']:.10g})"
    )


def flip_a_weight(checkpoint: Path) -> None:
    """Change one bit of one weight, and write a valid checkpoint."""
    state = load_checkpoint(checkpoint)
    state["model"]["model.layers.0.mlp.down_proj.weight"].view(torch.int32)[0, 0] ^= 1 << 24
    save_checkpoint(checkpoint.parent, state, step=8)


def change_env(checkpoint: Path) -> None:
    """Let another version of torch have written the record, and another rounding."""
    record = json.loads(record_of(checkpoint).read_text())
    record["env"]["torch"] = "2.12.0"
    record["loss"] = (float.fromhex(record["loss"]) + 3e-7).hex()
    record_of(checkpoint).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "flags", "expected"),
    [
        (flip_a_weight, {}, "step 9 differs from the run before: loss by "),
        (flip_a_weight, {}, "nothing that is known differs, so the memory, the device, a file or a library may be"),
        (change_env, {}, "loss by -3.0e-07 ("),
        (change_env, {}, f"; what differs: torch 2.12.0 -> {torch.__version__}"),
        (
            lambda checkpoint: None,
            {"training__batch_size": 8, "training__gradient_accumulation_steps": 1},
            "what differs: training.batch_size 4 -> 8, training.gradient_accumulation_steps 2 -> 1, sequences at once 4",
        ),
        (lambda checkpoint: record_of(checkpoint).unlink(), {}, "resume: step 9 cannot be compared: the run before"),
        (lambda checkpoint: record_of(checkpoint).write_text('{"step": 9}'), {}, "cannot be compared"),
        (lambda checkpoint: record_of(checkpoint).write_text("[" * 100_000), {}, "cannot be compared"),
    ],
    ids=["a weight", "a weight, why", "by how much", "torch", "micro-batches", "no record", "half a record", "no JSON"],
)
def test_a_resume_says_what_differs(
    finished: Path, tmp_path: Path, change: Callable[[Path], object], flags: dict[str, object], expected: str
) -> None:
    change(cut_back(finished, tmp_path / "run"))
    assert expected in line_of_resume(tmp_path / "run", **flags)


def test_a_run_that_ended_at_its_save_records_its_next_step_when_it_is_taken(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert "cannot be compared" in line_of_resume(tmp_path / "run", training__train_steps=16)
    assert (tmp_path / "run" / "checkpoints" / "step_0012.next.json").exists()


def test_the_record_is_removed_with_its_checkpoint(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__save_interval=2, training__keep_last=2))
    names = {path.name for path in (tmp_path / "checkpoints").glob("step_*")}
    assert names == {"step_0010.pt", "step_0010.next.json", "step_0012.pt"}


def test_the_record_moves_to_superseded_with_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    checkpoint = cut_back(finished, tmp_path / "run")
    train(
        tiny_config(tmp_path / "run", training__save_interval=0), checkpoint_path=checkpoint.with_name("step_0004.pt")
    )
    names = {path.name for path in (checkpoint.parent / "superseded").iterdir()}
    assert names == {"step_0008.pt", "step_0008.next.json"}


def test_a_checkpoint_folder_has_a_record_as_well(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__checkpoints="folder"))
    shutil.rmtree(tmp_path / "checkpoints" / "step_0012")
    assert "step 9 is bit-exact" in line_of_resume(tmp_path, training__checkpoints="folder")
