"""Checkpoints that are written while training goes on."""

import threading
from pathlib import Path

import pytest
import torch
from runs import outcome, tiny_config, write_tiny

from smollm2.checkpoint import format as checkpoint
from smollm2.checkpoint.format import content_hash, save_checkpoint, take_snapshot
from smollm2.training import loop as training
from smollm2.training import saving
from smollm2.training.loop import train


def test_training_goes_on_while_a_checkpoint_is_written_and_loses_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 4 waits for the update 6, which in a run that waited for its saves would never come."""
    write_tiny(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "memory_free", lambda: 1000)  # the run to compare with waits for its saves
        train(tiny_config(tmp_path, "whole"))
    came, updates = threading.Event(), 0
    original, update = checkpoint.save_checkpoint, training.update

    def save(folder: Path, state: dict[str, object], *, step: int) -> Path:
        assert step > 4 or came.wait(60)
        return original(folder, state, step=step)

    def count(*arguments: object, **named: object) -> object:
        nonlocal updates
        updates += 1
        if updates == 6:
            came.set()
        return update(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(training, "update", count)
    train(tiny_config(tmp_path))
    for step in (4, 8, 12):
        assert outcome(tmp_path / "checkpoints", step)[0] == outcome(tmp_path / "whole", step)[0], (
            f"the state after step {step} is another"
        )


def test_no_thread_of_a_save_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stays makes every later operation slower: OpenMP counts its workers."""
    write_tiny(tmp_path)
    writers: list[threading.Thread] = []
    original, finish = checkpoint.save_checkpoint, saving.Saver.finish

    def save(*arguments: object, **named: object) -> Path:
        writers.append(threading.current_thread())
        return original(*arguments, **named)  # type: ignore[arg-type]

    def finish_and_look(saver: saving.Saver, **named: bool) -> None:
        finish(saver, **named)
        for writer in writers:
            writer.join(5)
        assert not any(writer.is_alive() for writer in writers)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(saving.Saver, "finish", finish_and_look)
    train(tiny_config(tmp_path))
    assert len(writers) == 3


def test_a_run_without_memory_for_a_copy_waits_for_its_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    copied: list[object] = []
    monkeypatch.setattr(saving, "memory_free", lambda: 1000)
    monkeypatch.setattr(checkpoint, "take_snapshot", lambda *arguments: copied.append(arguments))
    train(tiny_config(tmp_path))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")][-1] == "step_0012.pt"
    assert not copied


def test_a_snapshot_stays_what_it_was_and_is_saved_as_the_state_is(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__train_steps=1))
    state = checkpoint.load_checkpoint(tmp_path / "checkpoints" / "step_0001.pt")
    before, snapshot = content_hash(state), take_snapshot(state, {})
    for weight in state["model"].values():
        with torch.no_grad():
            weight.add_(1)
    path = save_checkpoint(tmp_path, snapshot, step=1)
    assert content_hash(checkpoint.load_checkpoint(path)) == before
