"""Which checkpoints of a folder are found, in which order, and what is reported if one is missing."""

from pathlib import Path

import pytest
from states import never, save_steps

from smollm2.checkpoint.discovery import describe_missing, find_resumable, list_checkpoints, load_checkpoint
from smollm2.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_resuming_passes_over_damaged_ones_and_names_each(tmp_path: Path) -> None:
    """Promise A6."""
    paths = save_steps(tmp_path, 1, 2, 3, 4)
    paths[3].write_bytes(b"")
    paths[1].replace(paths[2])
    lines: list[str] = []
    found = find_resumable(tmp_path, lines.append)
    assert found is not None and found[0] == paths[0] and found[1]["step"] == 1
    assert [line.split(". Trying the next")[0] for line in lines] == [
        f"{paths[3]}: skipped: is empty",
        f"{paths[2]}: skipped: contains step 2, which does not match its name",
    ]


def test_a_named_checkpoint_of_any_name_loads(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 2)
    assert load_checkpoint(path.rename(tmp_path / "step_0009.pt"))["step"] == 2
    assert load_checkpoint((tmp_path / "step_0009.pt").rename(tmp_path / "mine"))["step"] == 2


def test_a_folder_without_checkpoints_has_nothing_to_resume(tmp_path: Path) -> None:
    assert find_resumable(tmp_path, never) is None
    assert find_resumable(tmp_path / "absent", never) is None


def test_a_folder_of_damaged_checkpoints_only_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    for path in save_steps(tmp_path, 1, 2):
        path.write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=f"^{tmp_path}: none of its checkpoints \\(2\\) can be used: step_0002.pt: is damaged"
    ):
        find_resumable(tmp_path, lambda line: None)


def test_checkpoints_are_ordered_by_the_number_in_their_name(tmp_path: Path) -> None:
    names = ["step_10000.pt", "step_9500.pt", "step_0500.pt", "step_7.pt", "step_00000000008.pt"]
    foreign = ["step_5.pt.bak", "step_.pt", "xstep_5.pt", "step_5.PT", "step_-5.pt", "step_٣.pt", "step_5.pt\n", "5.pt"]
    for name in names + foreign:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step_6.pt").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[i] for i in (3, 4, 2, 1, 0)]


def test_a_missing_checkpoint_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    save_steps(tmp_path, 500, 1000)
    path = tmp_path / "step_XXXX.pt"
    expected = f"{path}: does not exist; XXXX stands for a step number. {tmp_path} contains step_0500.pt, step_1000.pt."
    assert describe_missing(path) == expected
    with pytest.raises(CheckpointError, match=r"contains step_0500\.pt, step_1000\.pt"):
        load_checkpoint(path)


def test_a_folder_in_place_of_a_checkpoint_is_answered_with_what_it_holds(tmp_path: Path) -> None:
    save_steps(tmp_path, 500)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: is a folder. {tmp_path} contains step_0500.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["step_1.pt", "absent/step_1.pt"])
def test_a_missing_checkpoint_in_an_empty_folder_is_reported(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert describe_missing(path) == (
        f"{path}: does not exist, and {path.parent} contains no checkpoints. Train first, or choose another file."
    )


def test_of_many_checkpoints_the_newest_are_named(tmp_path: Path) -> None:
    for step in range(25):
        (tmp_path / f"step_{step:04d}.pt").write_bytes(b"")
    sentence = describe_missing(tmp_path / "x.pt")
    assert "step_0004.pt" not in sentence and sentence.endswith("step_0024.pt, and 5 older ones.")


def test_a_name_that_no_system_takes_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read \\(File name too long\\)"):
        load_checkpoint(tmp_path / ("x" * 300))
