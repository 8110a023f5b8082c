"""Checkpoints that are written while training continues, and what a disk may do to a save."""

import functools
import io
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from io_faults import dying_at, exit_code_in_a_fork, raising_at, record_operations
from runs import outcome, tiny_config, write_tiny
from states import never, save_steps, small_state

from smollm2.checkpoint import saving
from smollm2.checkpoint.discovery import find_resumable, list_checkpoints, load_checkpoint
from smollm2.checkpoint.format import content_hash, take_snapshot
from smollm2.checkpoint.retention import prune_checkpoints, record_best
from smollm2.checkpoint.saving import save_checkpoint
from smollm2.errors import ResourceError
from smollm2.storage.atomic import IO_OPS, IoOps
from smollm2.training import loop
from smollm2.training.loop import train
from smollm2.training.step import train_step


def test_latest_names_the_newest_save_with_its_size_and_sum(tmp_path: Path) -> None:
    path = save_steps(tmp_path, 1, 2)[1]
    sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=False).stdout.split(" ")[0]
    hint = json.loads((tmp_path / "latest.json").read_bytes())
    assert hint == {"file": "step_0002.pt", "step": 2, "sha256": hint["sha256"], "size": path.stat().st_size}
    assert sha256 in ("", hint["sha256"])


def save_third(folder: Path, io_ops: IoOps) -> None:
    """One whole save into a folder with steps 1 and 2: checkpoint, latest, best, and step 1 goes."""
    path = save_checkpoint(folder, small_state(3), step=3, io_ops=io_ops)
    record_best(folder, path, 1.0, io_ops=io_ops)
    prune_checkpoints(folder, keep_last=2, io_ops=io_ops)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "steps"
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture(scope="module")
def operations(two_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations one whole save is."""
    folder = tmp_path_factory.mktemp("count") / "steps"
    shutil.copytree(two_steps, folder)
    return len(record_operations(lambda io_ops: save_third(folder, io_ops)))


def assert_nothing_is_lost(folder: Path, before: Path) -> None:
    """The newest valid checkpoint is step 2 or 3 with its own numbers, and the older ones are those of `before`."""
    found = find_resumable(folder, never)
    assert found is not None and found[1]["step"] in (2, 3)
    path, state = found
    assert path.name == f"step_{state['step']:04d}.pt"
    assert content_hash(state["model"]) == content_hash(small_state(state["step"])["model"])
    *older, newest = list_checkpoints(folder)
    assert newest == path
    assert all(one.read_bytes() == (before / one.name).read_bytes() for one in older)
    for hint in folder.glob("*.json"):
        assert (folder / json.loads(hint.read_bytes())["file"]).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_crash_at_any_operation_of_a_save_loses_nothing(tmp_path: Path, two_steps: Path, operations: int) -> None:
    """Promise A2."""
    for position in range(operations):
        folder = tmp_path / str(position)
        shutil.copytree(two_steps, folder)
        io_ops = dying_at(position)
        assert exit_code_in_a_fork(functools.partial(save_third, folder, io_ops)) == 9
        assert_nothing_is_lost(folder, two_steps)
    assert operations > 50


@pytest.mark.parametrize(
    ("error", "comes_out_as"),
    [
        (OSError(28, "No space left on device"), ResourceError),
        (OSError(5, "Input/output error"), ResourceError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["ENOSPC", "EIO", "Ctrl-C"],
)
def test_an_error_at_any_operation_of_a_save_comes_out_as_itself_and_loses_nothing(
    tmp_path: Path, two_steps: Path, operations: int, error: BaseException, comes_out_as: type[BaseException]
) -> None:
    """Promises A2 and A4."""
    for position in range(operations):
        folder = tmp_path / str(position)
        shutil.copytree(two_steps, folder)
        with pytest.raises(comes_out_as):
            save_third(folder, raising_at(position, error))
        assert_nothing_is_lost(folder, two_steps)
        assert not list(folder.glob(".*.tmp.*"))


def test_a_checkpoint_is_complete_before_anything_names_it_and_before_an_older_one_is_deleted(
    tmp_path: Path, two_steps: Path
) -> None:
    """Promise A3."""
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    calls = record_operations(lambda io_ops: save_third(folder, io_ops))
    changes = [(name, arguments[-1].name) for name, arguments in calls if name in ("replace", "unlink", "fsync_dir")]
    assert changes == [
        ("replace", "step_0003.pt"),
        ("fsync_dir", "steps"),
        ("replace", "latest.json"),
        ("fsync_dir", "steps"),
        ("replace", "best.json"),
        ("fsync_dir", "steps"),
        ("unlink", "step_0001.pt"),
    ]


def test_a_save_without_room_reports_how_much_it_needs_before_it_writes(tmp_path: Path) -> None:
    """Promise A4."""

    class FullDisk(IoOps):
        def free_bytes(self, folder: Path) -> int:
            return 1000

    [older] = save_steps(tmp_path, 1)
    with pytest.raises(ResourceError, match=r"step_0002\.pt: was not saved: .*[0-9,]+ bytes are needed, 1,000"):
        save_checkpoint(tmp_path, small_state(2), step=2, io_ops=FullDisk())
    assert list_checkpoints(tmp_path) == [older] and load_checkpoint(older)["step"] == 1


def test_the_room_asked_for_is_what_the_file_takes_or_little_more(tmp_path: Path) -> None:
    state = {**small_state(), "config": "x" * 10_000, "model": {str(n): torch.ones(9000) for n in range(100)}}
    asked: list[int] = []
    calls = record_operations(
        lambda io_ops: asked.append(save_checkpoint(tmp_path, state, step=1, io_ops=io_ops).stat().st_size)
    )
    room = next(arguments[1] for name, arguments in calls if name == "allocate")
    assert asked[0] <= room <= 1.1 * asked[0]


def test_a_disk_that_gives_back_other_bytes_does_not_get_to_name_the_file(tmp_path: Path) -> None:
    class Liar(IoOps):
        def fsync(self, file: io.FileIO) -> None:
            super().fsync(file)
            os.pwrite(file.fileno(), b"\xff" * 64, file.tell() // 2)

    with pytest.raises(ResourceError, match="was not saved, because the written file failed its check: is damaged"):
        save_checkpoint(tmp_path, small_state(), step=1, io_ops=Liar())
    assert list(tmp_path.iterdir()) == []


def test_the_production_disk_is_not_watched() -> None:
    assert type(IO_OPS) is IoOps


def test_training_continues_bit_identically_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 4 waits for step 6, which never comes in a run that waits for its saves."""
    write_tiny(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "available_memory", lambda: 1000)  # the run to compare with waits for its saves
        train(tiny_config(tmp_path, "whole"))
    came, updates = threading.Event(), 0
    original = saving.save_checkpoint

    def save(folder: Path, state: dict[str, object], *, step: int, **named: Any) -> Path:
        assert step > 4 or came.wait(60)
        return original(folder, state, step=step, **named)

    def count(*arguments: Any, **named: Any) -> object:
        nonlocal updates
        updates += 1
        if updates == 6:
            came.set()
        return train_step(*arguments, **named)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    monkeypatch.setattr(loop, "train_step", count)
    train(tiny_config(tmp_path))
    for step in (4, 8, 12):
        assert outcome(tmp_path / "checkpoints", step)[0] == outcome(tmp_path / "whole", step)[0], (
            f"the state after step {step} is another"
        )


def test_no_thread_of_a_save_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stays makes every later operation slower: OpenMP counts its workers."""
    write_tiny(tmp_path)
    writers: list[threading.Thread] = []
    original, finish = saving.save_checkpoint, saving.Saver.finish

    def save(*arguments: object, **named: object) -> Path:
        writers.append(threading.current_thread())
        return original(*arguments, **named)  # type: ignore[arg-type]

    def finish_and_check(saver: saving.Saver, **named: bool) -> None:
        finish(saver, **named)
        for writer in writers:
            writer.join(5)
        assert not any(writer.is_alive() for writer in writers)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    monkeypatch.setattr(saving.Saver, "finish", finish_and_check)
    train(tiny_config(tmp_path))
    assert len(writers) == 3


def test_a_run_without_memory_for_a_copy_waits_for_its_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    copied: list[object] = []
    monkeypatch.setattr(saving, "available_memory", lambda: 1000)
    monkeypatch.setattr(saving, "take_snapshot", lambda *arguments: copied.append(arguments))
    train(tiny_config(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")][-1] == "step_0012.pt"
    assert not copied


def test_a_snapshot_stays_what_it_was_and_is_saved_as_the_state_is(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__train_steps=1))
    state = load_checkpoint(tmp_path / "checkpoints" / "step_0001.pt")
    before, snapshot = content_hash(state), take_snapshot(state, {})
    for weight in state["model"].values():
        with torch.no_grad():
            weight.add_(1)
    path = save_checkpoint(tmp_path, snapshot, step=1)
    assert content_hash(load_checkpoint(path)) == before
