"""Which checkpoints stay and which go, and which one is the best."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from io_faults import raising_at
from states import never, save_steps, small_state

from smollm2.checkpoint.discovery import find_resumable, list_checkpoints
from smollm2.checkpoint.retention import move_superseded, prune_checkpoints, recompute_best, record_best
from smollm2.checkpoint.saving import save_checkpoint
from smollm2.errors import ResourceError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_clocks_do_not_decide_which_checkpoint_is_newest_or_deleted(tmp_path: Path) -> None:
    """Promise A12."""
    paths = save_steps(tmp_path, 9, 10, 11)
    for path, time in zip(paths, (2e9, -1e6, 0.0), strict=True):
        os.utime(path, (time, time))
    found = find_resumable(tmp_path, never)
    assert found is not None and found[0] == paths[2]
    assert prune_checkpoints(tmp_path, 2) == [paths[0]]


def test_links_are_neither_resumed_from_nor_removed(tmp_path: Path) -> None:
    [elsewhere] = save_steps(tmp_path / "elsewhere", 1)
    folder = tmp_path / "run"
    paths = save_steps(folder, 2, 3)
    (folder / "step_0001.pt").symlink_to(elsewhere)
    assert list_checkpoints(folder) == paths
    assert prune_checkpoints(folder, 2) == [] and (folder / "step_0001.pt").is_symlink() and elsewhere.exists()


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, [1, 2, 3, 4]),
        ({"keep_every": 2}, [1, 3]),
        ({"protected": (1, 3)}, [2, 4]),
        ({"keep_every": 4, "protected": {1}}, [2, 3]),
    ],
)
def test_what_is_older_than_the_newest_two_goes_but_for_what_is_kept_on_purpose(
    tmp_path: Path, options: dict[str, Any], gone: list[int]
) -> None:
    """Promise A10."""
    paths = save_steps(tmp_path, *range(1, 7))
    assert prune_checkpoints(tmp_path, 2, **options) == [paths[step - 1] for step in gone]
    assert list_checkpoints(tmp_path) == [path for step, path in enumerate(paths, start=1) if step not in gone]


def test_keeping_fewer_than_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 1"):
        prune_checkpoints(tmp_path, 1)


def test_with_a_damaged_best_json_nothing_is_removed(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "best.json").write_text("{")
    assert prune_checkpoints(tmp_path, 2) == [] and list_checkpoints(tmp_path) == paths


def test_a_checkpoint_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    with pytest.raises(ResourceError, match=r"step_0001\.pt: cannot be removed \(Input/output error\)"):
        prune_checkpoints(tmp_path, 2, io_ops=raising_at(1, OSError(5, "Input/output error")))


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 2.0, 2.5], 2),
        ([3.0, 3.0], 1),
        ([float("nan"), 5.0], 2),
        ([5.0, float("nan"), float("inf")], 1),
    ],
)
def test_the_best_is_the_first_of_the_lowest_validation_loss(tmp_path: Path, losses: list[float], best: int) -> None:
    for step, loss in enumerate(losses, start=1):
        record_best(tmp_path, save_steps(tmp_path, step)[0], loss, windows=8)
    found = json.loads((tmp_path / "best.json").read_bytes())
    assert found == {"file": f"step_{best:04d}.pt", "step": best, "validation_loss": losses[best - 1], "windows": 8}


def test_a_best_that_is_gone_or_damaged_gives_way(tmp_path: Path) -> None:
    first, second = save_steps(tmp_path, 1, 2)
    record_best(tmp_path, first, 1.0)
    first.unlink()
    record_best(tmp_path, second, 9.0)
    assert json.loads((tmp_path / "best.json").read_bytes())["step"] == 2
    (tmp_path / "best.json").write_text('{"file": "../x"}')
    record_best(tmp_path, second, 9.0)
    assert json.loads((tmp_path / "best.json").read_bytes())["step"] == 2


class Retention(RuleBasedStateMachine):
    """Saves, failed saves, damage, deletion and pruning in any order, against a model of what must be there.

    Promise A10.
    """

    folder: Path
    prepared: dict[int, bytes]

    @initialize()
    def begin(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.foreign = ["step_0001.pt.bak", "mine.pt", "step_1"]
        for name in self.foreign:
            (self.folder / name).write_bytes(b"x")
        self.step = 0
        self.valid: set[int] = set()
        self.damaged: set[int] = set()
        self.losses: dict[int, float] = {}
        self.best: int | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:04d}.pt"

    @precondition(lambda self: self.step < 20)
    @rule(loss=st.none() | st.sampled_from([1.0, 2.0, 3.0]))
    def save(self, loss: float | None) -> None:
        self.step += 1
        self.path(self.step).write_bytes(self.prepared[self.step])
        self.valid.add(self.step)
        if loss is not None:
            record_best(self.folder, self.path(self.step), loss)
            if self.best not in self.valid | self.damaged or loss < self.losses[self.best]:
                self.best = self.step
                self.losses[self.step] = loss

    @rule(position=st.integers(0, 40))
    def fail_to_save(self, position: int) -> None:
        with pytest.raises(ResourceError):
            save_checkpoint(
                self.folder, small_state(99), step=99, io_ops=raising_at(position, OSError(28, "No space left"))
            )

    @precondition(lambda self: self.valid)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.valid)))
        content = self.prepared[step]
        self.path(step).write_bytes(content[: len(content) // 2])
        self.valid.remove(step)
        self.damaged.add(step)

    @precondition(lambda self: self.valid | self.damaged)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.valid | self.damaged)))
        self.path(step).unlink()
        self.valid.discard(step)
        self.damaged.discard(step)

    @rule(
        keep_last=st.integers(2, 4),
        keep_every=st.none() | st.integers(2, 5),
        protected=st.sets(st.integers(1, 20), max_size=2),
    )
    def prune(self, keep_last: int, keep_every: int | None, protected: set[int]) -> None:
        newest = sorted(self.valid)[-keep_last:]
        gone = {
            step
            for step in self.valid | self.damaged
            if len(newest) == keep_last
            and step < newest[0]
            and step not in protected
            and step != self.best
            and (keep_every is None or step % keep_every)
        }
        removed = prune_checkpoints(self.folder, keep_last, keep_every, protected=protected)
        assert removed == [self.path(step) for step in sorted(gone)]
        self.valid -= gone
        self.damaged -= gone

    @invariant()
    def exactly_these_files_are_there(self) -> None:
        expected = [self.path(step).name for step in self.valid | self.damaged] + self.foreign
        assert sorted(path.name for path in self.folder.iterdir() if path.suffix != ".json") == sorted(expected)


def test_retention_keeps_and_removes_what_it_should_whatever_happened_before(tmp_path: Path) -> None:
    """Promise A10."""
    paths = save_steps(tmp_path / "prepared", *range(1, 21))
    (tmp_path / "run").mkdir()
    Retention.folder = tmp_path / "run"
    Retention.prepared = {step: path.read_bytes() for step, path in enumerate(paths, start=1)}
    Retention.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
    case = Retention.TestCase()
    case.runTest()


def test_losses_over_other_windows_are_not_compared(tmp_path: Path) -> None:
    first, second, third = save_steps(tmp_path, 1, 2, 3)
    assert record_best(tmp_path, first, 1.0, windows=8)
    assert not record_best(tmp_path, second, 2.0, windows=8)
    assert record_best(tmp_path, third, 3.0, windows=16)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ('{"step": 1, "validation_loss": 2.0}\n{"step": 2, "validation_loss": 1.5, "validation_windows": 8}', 2),
        ('{"step": 1, "validation_loss": 2.0}\n{"step": 2, "validation_loss": 1.5, "validation_windows": 99}', 1),
        ('{"step": 1, "validation_loss": null}\ntorn', None),
    ],
    ids=["the lowest", "other windows", "no numbers"],
)
def test_a_best_that_was_moved_away_is_recomputed_from_the_metrics_rows(
    tmp_path: Path, rows: str, best: int | None
) -> None:
    *_, moved = save_steps(tmp_path, 1, 2, 3)
    record_best(tmp_path, moved, 1.0, windows=8)
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert move_superseded(tmp_path, 2) == [tmp_path / "superseded" / "step_0003.pt"]
    recompute_best(tmp_path, 8)
    found = json.loads((tmp_path / "best.json").read_bytes())["step"] if (tmp_path / "best.json").exists() else None
    assert found == best


def test_a_link_in_the_place_of_superseded_is_not_followed(tmp_path: Path) -> None:
    """Promise G3."""
    paths = save_steps(tmp_path / "run", 1, 2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "superseded").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match="superseded: is a symbolic link"):
        move_superseded(tmp_path / "run", 1)
    assert list_checkpoints(tmp_path / "run") == paths
