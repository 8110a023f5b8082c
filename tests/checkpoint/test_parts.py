"""Checkpoints that are folders with a part from each rank: what is written, what a disk and a stranger may do to them."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from io_faults import dying_at, raising_at, record_operations
from states import never, save_steps, small_state
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from two_ranks import Ended, run_ranks

from smollm2.checkpoint.discovery import find_resumable, list_checkpoints, load_checkpoint
from smollm2.checkpoint.format import State, content_hash
from smollm2.checkpoint.parts import describe_file, divide_state
from smollm2.checkpoint.parts_saving import save_parts
from smollm2.checkpoint.reading import is_valid
from smollm2.checkpoint.retention import prune_checkpoints
from smollm2.cli.main import main
from smollm2.errors import CheckpointError, ResourceError
from smollm2.storage.atomic import IO_OPS, IoOps, remove_stale_temporaries

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU")


def save_folder(folder: Path, step: int = 1, io_ops: IoOps = IO_OPS) -> Path:
    """A checkpoint folder that one process writes."""
    folder.mkdir(exist_ok=True)
    return save_parts(folder, divide_state(small_state(step), tied=True), io_ops=io_ops)


def shared_state(step: int) -> State:
    """The state with its tensors split by rows over the ranks, unevenly."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def share(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor

    state = small_state(step)
    state["model"] = {name: share(tensor) for name, tensor in state["model"].items()}
    moments = state["optimizer"]["adamw"]["state"]["state"]
    moments[0] = {name: share(tensor) for name, tensor in moments[0].items()}
    return state


def save_on_ranks(folder: Path, step: int, disk: Callable[[int], IoOps], ranks: int = 2) -> list[Ended]:
    """Save a shared-out state; `disk` gives each rank its own."""

    def work(rank: int) -> int:
        dist.init_process_group("gloo")
        try:
            save_parts(folder, divide_state(shared_state(step), tied=True, group=dist.group.WORLD), io_ops=disk(rank))
        except ResourceError as error:
            print(error)
            return error.exit_code
        return 0

    return run_ranks(work, folder, ranks)


def hash_of(state: State) -> str:
    return content_hash({name: state[name] for name in ("model", "optimizer", "rng", "stability", "step")})


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_folder_of_any_number_of_ranks_holds_what_a_file_holds(ranks: int, tmp_path: Path) -> None:
    [file] = save_steps(tmp_path, 1)
    assert [rank.code for rank in save_on_ranks(tmp_path, 1, lambda rank: IO_OPS, ranks)] == [0] * ranks
    assert len(list((tmp_path / "step_0001").glob("*.distcp"))) == ranks
    assert hash_of(load_checkpoint(tmp_path / "step_0001")) == hash_of(load_checkpoint(file))


def test_the_head_of_a_tied_model_is_the_embedding_again(tmp_path: Path) -> None:
    model = load_checkpoint(save_folder(tmp_path))["model"]
    assert model["lm_head.weight"] is model["model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations on the disk the save of one rank is."""
    return len(record_operations(lambda io_ops: save_folder(tmp_path_factory.mktemp("count"), 2, io_ops)))


def hash_of_saved(step: int, folder: Path) -> str:
    return hash_of(load_checkpoint(save_folder(folder, step)))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_of_a_rank_at_any_operation_leaves_the_last_good_checkpoint(
    rank: int, operations: int, tmp_path: Path
) -> None:
    """Promise A2."""
    expected = {step: hash_of_saved(step, tmp_path / f"{step}") for step in (1, 2)}
    seen = set()
    for position in range(operations):
        folder = tmp_path / f"run{position}"
        save_folder(folder, 1)
        ended = save_on_ranks(folder, 2, lambda mine, at=position: dying_at(at) if mine == rank else IO_OPS)  # type: ignore[misc]
        seen.add(ended[rank].code)
        found = find_resumable(folder, never)
        assert found is not None
        assert hash_of(found[1]) == expected[found[1]["step"]]
        remove_stale_temporaries(folder)
        assert not list(folder.glob(".step*"))
        shutil.rmtree(folder)
    assert 9 in seen


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_ends_the_save_on_all_and_leaves_nothing(rank: int, tmp_path: Path) -> None:
    """Promise A4."""
    save_folder(tmp_path, 1)
    full = OSError(28, "No space left on device")
    ended = save_on_ranks(tmp_path, 2, lambda mine: raising_at(2, full) if mine == rank else IO_OPS)
    assert [one.code for one in ended] == [ResourceError.exit_code] * 2
    assert "No space left on device" in ended[rank].out
    assert f"rank {rank} failed" in ended[1 - rank].out
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0001"]
    assert not list(tmp_path.glob(".step*"))


def damage_bit(path: Path, randomness: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
    path.write_bytes(data)


def shorten(path: Path, randomness: random.Random) -> None:
    os.truncate(path, randomness.randrange(path.stat().st_size))


@pytest.mark.parametrize(("damage", "times"), [(damage_bit, 200), (shorten, 50)], ids=["a bit", "the end"])
def test_damage_anywhere_is_refused_by_name_or_changes_nothing(
    damage: Callable[[Path, random.Random], None], times: int, tmp_path: Path
) -> None:
    sound = save_folder(tmp_path)
    expected, randomness = hash_of(load_checkpoint(sound)), random.Random(0)
    files = sorted(sound.iterdir())
    for number in range(times):
        copy = tmp_path / "step_0007"
        shutil.copytree(sound, copy)
        file = copy / files[number % len(files)].name
        damage(file, randomness)
        try:
            found = hash_of(load_checkpoint(copy))
        except CheckpointError as error:
            found = str(error)
        # A damaged manifest accuses the files that it no longer describes.
        assert found == expected or file.name in found or (file.name == "manifest.json" and "step_0007: " in found)
        shutil.rmtree(copy)


def rewrite_manifest(folder: Path) -> None:
    """What somebody would do who wants the hashes to match."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, one in manifest["files"].items():
        one["size"], one["sha256"] = describe_file(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Hostile:
    """An object whose pickle creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def run_code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))


def edit_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def lead_elsewhere(folder: Path) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../../secret"

    edit_metadata(folder, change)


def claim_a_terabyte(folder: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["model/model.norm.weight"].size = torch.Size([2**40])

    edit_metadata(folder, change)


def claim_another_place(folder: Path) -> None:
    edit_metadata(
        folder, lambda m: m.state_dict_metadata.update({"x": m.state_dict_metadata["model/model.norm.weight"]})
    )


def lose_rows(folder: Path) -> None:
    edit_metadata(folder, lambda m: m.state_dict_metadata["model/model.norm.weight"].chunks.clear())


def lose_a_shard(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def add_a_shard(folder: Path) -> None:
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")


def take_a_shard_of_another_step(folder: Path) -> None:
    other = save_folder(folder.parent / "other", 2)
    shutil.copy(other / "__0_0.distcp", folder / "__0_0.distcp")


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def list_a_path(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def list_numbers(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": [1, 2]}')


FAULTS = {
    "code in the metadata": (run_code, True, "has metadata that would run code (posix.mkdir)"),
    "a path in the metadata": (lead_elsewhere, True, "has metadata that leads to other files"),
    "a terabyte": (claim_a_terabyte, True, "which are more than its files hold"),
    "a tensor without a place": (claim_another_place, True, "has a tensor without a place: 'x'"),
    "lost rows": (lose_rows, True, "lacks a part of 'model/model.norm.weight'"),
    "a lost shard": (lose_a_shard, False, "lacks __0_0.distcp"),
    "a shard too many": (add_a_shard, False, "contains __1_0.distcp, which belongs to another checkpoint"),
    "a shard of another step": (take_a_shard_of_another_step, False, "__0_0.distcp does not match its hash"),
    "a lost manifest": (lose_the_manifest, False, "is a folder"),
    "a path in the manifest": (list_a_path, False, "has a manifest.json that does not list the files of a checkpoint"),
    "a manifest of numbers": (list_numbers, False, "has a damaged manifest.json"),
}


@pytest.mark.parametrize(("fault", "hides", "problem"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_not_a_whole_checkpoint_is_refused_in_one_sentence(
    fault: Callable[[Path], None], hides: bool, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_folder(tmp_path / "run")
    fault(folder)
    if hides:
        rewrite_manifest(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_the_newest_valid_one_is_found_among_files_and_folders(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for step in (2, 10):
        save_folder(tmp_path, step)
    lose_a_shard(tmp_path / "step_0010")
    skipped: list[str] = []
    found = find_resumable(tmp_path, skipped.append)
    assert found is not None
    assert found[0].name == "step_0002"
    assert "step_0010: skipped: lacks __0_0.distcp" in skipped[0]


def test_a_folder_with_the_name_of_another_step_is_neither_resumed_from_nor_counted(tmp_path: Path) -> None:
    save_folder(tmp_path, 1).rename(tmp_path / "step_0009")
    save_folder(tmp_path, 2)
    reports: list[str] = []
    found = find_resumable(tmp_path, reports.append)
    assert found and found[0].name == "step_0002"
    assert "contains step 1, which does not match its name" in reports[0]
    assert [is_valid(path) for path in list_checkpoints(tmp_path)] == [True, False]


def test_folders_are_pruned_by_the_rules_of_files(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_folder(tmp_path, step)
    prune_checkpoints(tmp_path, 2, protected={1})
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step_0001", "step_0004", "step_0005"]


def test_a_file_becomes_a_folder_and_a_file_again_with_every_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [file] = save_steps(tmp_path, 1)
    hint = (tmp_path / "latest.json").read_bytes()
    assert main(["convert", str(file), str(tmp_path / "step_0001")]) == 0
    assert main(["convert", str(tmp_path / "step_0001"), str(tmp_path / "back" / "step_0001.pt")]) == 0
    assert content_hash(load_checkpoint(tmp_path / "back" / "step_0001.pt")) == content_hash(load_checkpoint(file))
    assert (tmp_path / "latest.json").read_bytes() == hint
    assert "step_0001.pt: the same checkpoint, read again and compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("step_0001.pt", "exists already"),
        ("step_0002", "is not the name of step 1. Call it step_0001"),
        ("x.pt", "x.pt"),
    ],
)
def test_a_conversion_to_a_wrong_name_is_refused(
    target: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [file] = save_steps(tmp_path, 1)
    assert main(["convert", str(file), str(tmp_path / target)]) == 4
    assert problem in capsys.readouterr().err


def test_two_saves_of_one_state_have_the_same_bytes(tmp_path: Path) -> None:
    first, second = (save_folder(tmp_path / name) for name in ("a", "b"))
    for path in first.glob("*distcp"):
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert (first / ".metadata").read_bytes() == (second / ".metadata").read_bytes()
