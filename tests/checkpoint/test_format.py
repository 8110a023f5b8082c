import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from io_faults import dying_at, exit_code_in_a_fork, raising_at, record_operations
from safetensors.torch import save_file
from torch import Tensor

from smollm2.checkpoint.format import (
    ENTRIES,
    FORMAT,
    content_hash,
    describe_missing,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    note_best,
    prune_checkpoints,
    save_checkpoint,
)
from smollm2.errors import CheckpointError, ResourceError, TrainingError
from smollm2.storage.atomic import IO_OPS, IoOps

pytestmark = pytest.mark.usefixtures("one_thread")


def small_state(step: int = 1) -> dict[str, Any]:
    """A whole state of a tied model with a few hundred weights; another step has other numbers everywhere."""
    generator = torch.Generator().manual_seed(step)
    embedding = torch.randn(8, 4, generator=generator)
    return {
        "format": FORMAT,
        "step": step,
        "tokens": 100 * step,
        "loss": 1.0 / (1 + step),
        "model": {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": torch.randn(4, generator=generator).bfloat16(),
            "lm_head.weight": embedding,
        },
        "optimizer": {
            "adamw": {
                "parameters": ["model.embed_tokens.weight", "model.norm.weight"],
                "state": {
                    "state": {
                        0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(8, 4, generator=generator)}
                    },
                    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "params": [0, 1]}],
                },
            }
        },
        "scheduler": {"schedule": "cosine", "step": step, "learning_rate": 1e-3},
        "scaler": {},
        "data": {
            "seed": 1,
            "epoch": 0,
            "next_batch": step,
            "order_version": 1,
            "tokens_fingerprint": "f" * 64,
            "tokens": 1000,
            "windows": 10,
        },
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": [],
            "python": random.Random(step).getstate(),
            "numpy": {"kind": "MT19937", "keys": torch.arange(5), "position": 3, "has_gauss": 0, "gauss": 0.0},
        },
        "stability": {
            "skipped": [],
            "best_validation_loss": float("inf"),
            "losses": [2.5],
            "spikes": [],
            "pending": [],
        },
        "best": {},
        "config": '{"model": {}}',
        "tokenizer": {"text": "bytes", "fingerprint": "b" * 64, "vocab_size": 257, "end_of_text": 256},
        "env": {"torch": str(torch.__version__), "threads": 1},
        "wandb_run_id": "",
        "created_unix": 1.5e9,
    }


def save_steps(folder: Path, *steps: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [save_checkpoint(folder, small_state(step), step=step) for step in steps]


def write_raw(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A file that torch itself writes, of a state as it lies on the disk after `change`."""
    content = torch.load(save_steps(path.parent / "sound", 1)[0], weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def never(line: str) -> None:
    pytest.fail(f"nothing was to be refused: {line}")


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 500)
    loaded = load_checkpoint(path)
    assert path.name == "step_0500.pt"
    assert loaded.keys() == small_state(500).keys()
    assert content_hash({**loaded, "rng": 0}) == content_hash({**small_state(500), "rng": 0})
    assert loaded["rng"]["python"] == random.Random(500).getstate()


def test_any_torch_load_opens_a_checkpoint_and_finds_the_users_five_entries(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 7)
    content = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "scheduler", "step", "loss"} <= content.keys()


def test_a_loaded_state_is_saved_again_as_it_was(tmp_path: Path) -> None:
    first = load_checkpoint(save_steps(tmp_path, 3)[0])
    second = load_checkpoint(save_checkpoint(tmp_path, first, step=3))
    assert content_hash(first) == content_hash(second)


def test_a_loaded_state_does_not_lean_on_its_file(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 3)
    loaded = load_checkpoint(path)
    before = content_hash(loaded)
    path.write_bytes(bytes(path.stat().st_size))
    assert content_hash(loaded) == before


def test_tied_weights_are_stored_once_and_are_one_tensor_again(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 1)
    content = torch.load(path, weights_only=True)
    assert "lm_head.weight" not in content["model"]
    assert content["tied"] == [["lm_head.weight", "model.embed_tokens.weight"]]
    model = load_checkpoint(path)["model"]
    assert model["lm_head.weight"] is model["model.embed_tokens.weight"]


def test_equal_weights_that_are_not_tied_stay_two(tmp_path: Path) -> None:
    state = small_state()
    state["model"]["lm_head.weight"] = state["model"]["lm_head.weight"].clone()
    model = load_checkpoint(save_checkpoint(tmp_path, state, step=1))["model"]
    assert model["lm_head.weight"].data_ptr() != model["model.embed_tokens.weight"].data_ptr()


def test_a_view_is_saved_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    state = small_state()
    state["model"]["model.norm.weight"] = torch.ones(1_000_000)[:4].requires_grad_()
    path = save_checkpoint(tmp_path, state, step=1)
    assert path.stat().st_size < 100_000
    assert torch.equal(load_checkpoint(path)["model"]["model.norm.weight"], torch.ones(4))


def test_an_ordered_dictionary_as_modules_give_it_is_saved(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    path = save_checkpoint(tmp_path, {**small_state(), "model": module.state_dict()}, step=1)
    assert type(module.state_dict()) is OrderedDict
    assert torch.equal(load_checkpoint(path)["model"]["weight"], module.weight)


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.ones(2), Path("x"), frozenset(), {(1, 2): 3}, torch.__version__, torch.Size([1])],
    ids=repr,
)
def test_a_value_that_no_load_would_take_is_refused_at_the_save_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"state\.best\.there"):
        save_checkpoint(tmp_path, {**small_state(), "best": {"there": [value]}}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_step_is_refused_at_the_save(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="step 1, not 2"):
        save_checkpoint(tmp_path, small_state(1), step=2)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    state = small_state()
    state["model"]["model.norm.weight"][1] = float("inf")
    with pytest.raises(TrainingError, match=r"step_0001\.pt - it was not saved: 'model\.norm\.weight' in model holds"):
        save_checkpoint(tmp_path, state, step=1)
    assert list(tmp_path.iterdir()) == []


def test_latest_names_the_newest_save_with_its_size_and_sum(tmp_path: Path) -> None:
    path = save_steps(tmp_path, 1, 2)[1]
    sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=False).stdout.split(" ")[0]
    hint = json.loads((tmp_path / "latest.json").read_bytes())
    assert hint == {"file": "step_0002.pt", "step": 2, "sha256": hint["sha256"], "size": path.stat().st_size}
    assert sha256 in ("", hint["sha256"])


# What the disk may do


def save_third(folder: Path, io_ops: IoOps) -> None:
    """One whole save into a folder with steps 1 and 2: checkpoint, latest, best, and step 1 goes."""
    path = save_checkpoint(folder, small_state(3), step=3, io_ops=io_ops)
    note_best(folder, path, 3, 1.0, io_ops)
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


def assert_nothing_is_lost(folder: Path) -> None:
    """The newest valid checkpoint is step 2 or 3 with its own numbers, and no file under a final name is wrong."""
    found = find_resumable(folder, never)
    assert found is not None and found[1]["step"] in (2, 3)
    for path in list_checkpoints(folder):
        state = load_checkpoint(path)
        assert path.name == f"step_{state['step']:04d}.pt"
        assert content_hash(state["model"]) == content_hash(small_state(state["step"])["model"])
    for hint in folder.glob("*.json"):
        assert (folder / json.loads(hint.read_bytes())["file"]).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_crash_at_any_operation_of_a_save_loses_nothing(tmp_path: Path, two_steps: Path, operations: int) -> None:
    """Promise A2."""
    for position in range(operations):
        folder = tmp_path / str(position)
        shutil.copytree(two_steps, folder)
        io_ops = dying_at(position)
        assert exit_code_in_a_fork(lambda folder=folder, io_ops=io_ops: save_third(folder, io_ops)) == 9
        assert_nothing_is_lost(folder)
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
        assert_nothing_is_lost(folder)
        assert not list(folder.glob(".*.tmp.*"))


def test_a_checkpoint_stands_before_anything_names_it_and_before_an_older_one_goes(
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


def test_a_save_without_room_says_how_much_it_needs_before_it_writes(tmp_path: Path) -> None:
    """Promise A4."""

    class FullDisk(IoOps):
        def free_bytes(self, folder: Path) -> int:
            return 1000

    [older] = save_steps(tmp_path, 1)
    with pytest.raises(
        ResourceError, match=r"step_0002\.pt - it was not saved: .*; [0-9,]+ bytes are needed and 1,000"
    ):
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

    with pytest.raises(ResourceError, match="does not read back as written: it is damaged"):
        save_checkpoint(tmp_path, small_state(), step=1, io_ops=Liar())
    assert list(tmp_path.iterdir()) == []


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_steps(tmp_path_factory.mktemp("sound"), 1)[0].read_bytes()


def flip_bit(data: bytes, chance: random.Random) -> bytes:
    position = chance.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :]


def zero_block(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(0, len(data), 512)
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


def truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


@pytest.mark.parametrize(
    ("damage", "trials", "at_most_harmless"), [(flip_bit, 200, 100), (truncate, 50, 0), (zero_block, 40, 10)]
)
def test_a_damaged_checkpoint_loads_equal_or_is_refused_by_name(
    tmp_path: Path, sound: bytes, damage: Callable[[bytes, random.Random], bytes], trials: int, at_most_harmless: int
) -> None:
    """Promise A6. Harmless is what no reader looks at: the padding between records."""
    chance, path, harmless = random.Random(6), tmp_path / "step_0001.pt", 0
    path.write_bytes(sound)
    expected = content_hash(load_checkpoint(path))
    refusals: list[str] = []
    for _ in range(trials):
        path.write_bytes(damage(sound, chance))
        try:
            assert content_hash(load_checkpoint(path)) == expected
            harmless += 1
        except CheckpointError as error:
            refusals.append(str(error))
    assert all(line.startswith(f"{path} - it ") and "\n" not in line for line in refusals)
    assert harmless <= at_most_harmless


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"not a checkpoint", "it is damaged, or no checkpoint of this program"),
        (bytes(10_000), "it is damaged, or no checkpoint of this program"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    """Promise A6."""
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


def test_resuming_passes_over_damaged_ones_and_names_each(tmp_path: Path) -> None:
    """Promise A6."""
    paths = save_steps(tmp_path, 1, 2, 3, 4)
    paths[3].write_bytes(b"")
    paths[1].replace(paths[2])
    lines: list[str] = []
    found = find_resumable(tmp_path, lines.append)
    assert found is not None and found[0] == paths[0] and found[1]["step"] == 1
    assert [line.split(" - the next")[0] for line in lines] == [
        f"{paths[3]} - refused: it is empty",
        f"{paths[2]} - refused: its own step is 2, which is not that of its name",
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
        CheckpointError, match=f"^{tmp_path} - none of its 2 checkpoints can be used: step_0002.pt: it is"
    ):
        find_resumable(tmp_path, lambda line: None)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_without_any_one_entry_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Promise B6."""

    def remove(content: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            content = content[parent]
        del content[last]

    reason = "no checkpoint of this program" if name == "format" else f"{name} is missing"
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write_raw(tmp_path / "x.pt", remove))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_another_type_is_refused_by_name(tmp_path: Path, name: str) -> None:
    def spoil(content: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            content = content[parent]
        content[last] = None

    reason = "no checkpoint of this program" if name == "format" else f"{name} is a NoneType and must be a"
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write_raw(tmp_path / "x.pt", spoil))


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.pt", lambda content: content.update(format="smollm2-train/2"))
    with pytest.raises(CheckpointError, match=r"'smollm2-train/2' and this version reads 'smollm2-train/1'; a newer"):
        load_checkpoint(path)


def set_weight(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({"model.norm.weight": value})


def nest_ten_to_the_twelve_times(content: dict[str, Any]) -> None:
    nested: list[Any] = [1]
    for _ in range(12):
        nested = [nested] * 10
    content["best"]["there"] = nested


def nest_in_itself(content: dict[str, Any]) -> None:
    content["best"]["again"] = content["best"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            set_weight(torch.tensor([1.0, float("nan")])),
            r"'model\.norm\.weight' in model holds values that are not finite",
        ),
        (set_weight(torch.ones(1).expand(10**12)), "is a tensor that is not as large as it says"),
        (set_weight(torch.ones(100)[:4]), "is a tensor that is not as large as it says"),
        (set_weight(torch.ones(3, 3).to_sparse()), "which no checkpoint holds"),
        (set_weight(torch.ones(3, 3, device="meta")), "which no checkpoint holds"),
        (set_weight(torch.nn.Parameter(torch.ones(3))), "which no checkpoint holds"),
        (set_weight(1.0), "in model is no tensor"),
        (lambda content: content["tied"].append(["lm_head.weight", "nothing"]), "tied does not name tensors"),
        (lambda content: content["optimizer"]["adamw"].pop("parameters"), "'adamw': parameters is missing"),
        (lambda content: content["optimizer"].update(muon=1), "optimizer.'muon' is a int"),
        (lambda content: content["best"].update(there={1, 2}), "'best.there' is a set, which no checkpoint holds"),
        (lambda content: content["best"].update({"\x1b[2J": {1}}), r"'best.\\x1b\[2J' is a set"),
        (lambda content: content["best"].update({1.5: 1}), "has a key that is a float"),
        (nest_ten_to_the_twelve_times, "is nested in a way that no checkpoint is"),
        (nest_in_itself, "is nested in a way that no checkpoint is"),
    ],
)
def test_a_content_that_no_save_writes_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], reason: str
) -> None:
    """Promise G2."""
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write_raw(tmp_path / "x.pt", spoil))


# Hostile files


class Command:
    """What a pickle may hold: a function to call, with its arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def rewrite(sound: bytes, path: Path, change: Callable[[str, bytes], bytes], **how: Any) -> None:
    """The same archive with other records, whose checksums hold."""
    with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(path, "w", **how) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def with_pickle(data: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, old: data if name.endswith("data.pkl") else old


def make_zip_with_command(sound: bytes, path: Path, command: object) -> None:
    torch.save({"format": FORMAT, "model": command}, path)


def make_legacy(sound: bytes, path: Path, command: object) -> None:
    torch.save({"format": FORMAT, "model": command}, path, _use_new_zipfile_serialization=False)


def make_pickle(sound: bytes, path: Path, command: object) -> None:
    path.write_bytes(pickle.dumps(command))


def make_tar(sound: bytes, path: Path, command: object) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            record = tarfile.TarInfo(name)
            record.size = len(pickle.dumps(command))
            archive.addfile(record, io.BytesIO(pickle.dumps(command)))


def make_torchscript(sound: bytes, path: Path, command: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("constants.pkl", "data.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(command))


def make_safetensors(sound: bytes, path: Path, command: object) -> None:
    save_file({"x": torch.ones(3)}, path)


def make_safetensors_with_a_huge_header(sound: bytes, path: Path, command: object) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def make_bomb(sound: bytes, path: Path, command: object) -> None:
    rewrite(sound, path, lambda name, old: bytes(200_000_000) if name.endswith("data/0") else old, compression=8)


def make_double_names(sound: bytes, path: Path, command: object) -> None:
    path.write_bytes(sound)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickle.dumps(command))


def make_escaping_name(sound: bytes, path: Path, command: object) -> None:
    path.write_bytes(sound)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/../../x", b"x")


def make_absolute_name(sound: bytes, path: Path, command: object) -> None:
    path.write_bytes(sound)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("/etc/x", b"x")


def make_encrypted(sound: bytes, path: Path, command: object) -> None:
    path.write_bytes(sound.replace(b"PK\x01\x02\x00\x00\x00\x00\x08\x08", b"PK\x01\x02\x00\x00\x00\x00\x09\x08"))
    assert path.read_bytes() != sound


def make_short_storage(sound: bytes, path: Path, command: object) -> None:
    rewrite(sound, path, lambda name, old: old[:8] if name.endswith("data/0") else old)


def make_deep(sound: bytes, path: Path, command: object) -> None:
    text = FORMAT.encode()
    start = b"\x80\x02}(X\x06\x00\x00\x00formatX" + struct.pack("<I", len(text)) + text + b"X\x04\x00\x00\x00best"
    rewrite(sound, path, with_pickle(start + b"]" * 100_000 + b"a" * 99_999 + b"u."))


HOSTILE = [
    make_zip_with_command,
    make_legacy,
    make_pickle,
    make_tar,
    make_torchscript,
    make_safetensors,
    make_safetensors_with_a_huge_header,
    make_bomb,
    make_double_names,
    make_escaping_name,
    make_absolute_name,
    make_encrypted,
    make_short_storage,
    make_deep,
]


@pytest.mark.parametrize(
    ("make", "function"),
    [
        *((make, "os.system") for make in HOSTILE),
        (make_zip_with_command, "eval"),
        (make_zip_with_command, "open"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_hostile_file_is_refused_and_runs_nothing(
    tmp_path: Path, sound: bytes, make: Callable[[bytes, Path, object], None], function: str
) -> None:
    """Promises G1 and G2."""
    canary, path = tmp_path / "canary", tmp_path / "step_0001.pt"
    commands = {
        "os.system": Command(os.system, f"touch {canary}"),
        "eval": Command(eval, f"open({str(canary)!r}, 'w')"),
        "open": Command(open, str(canary), "w"),
    }
    make(sound, path, commands[function])
    with pytest.raises(CheckpointError, match=f"^{path} - ") as raised:
        load_checkpoint(path)
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
    assert not canary.exists()


def make_giant(sound: bytes, path: Path, command: object) -> None:
    write_raw(path, set_weight(torch.ones(1).expand(10**12)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("make", [make_bomb, make_deep, make_giant])
def test_a_file_that_unfolds_is_refused_within_300_megabytes(
    tmp_path: Path, sound: bytes, make: Callable[[bytes, Path, object], None]
) -> None:
    """Promise G2."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.pt"
    make(sound, path, None)

    def load_with_little_memory() -> None:
        limit = psutil.Process().memory_info().vms + 300_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(CheckpointError, match=r"archive is packed|is nested|not as large as it says"):
            load_checkpoint(path)

    assert exit_code_in_a_fork(load_with_little_memory) == 0


def test_the_hostile_command_would_run_if_it_were_let(tmp_path: Path) -> None:
    """The control of the test above."""
    make_zip_with_command(b"", tmp_path / "x.pt", Command(open, str(tmp_path / "canary"), "w"))
    torch.load(tmp_path / "x.pt", weights_only=False)["model"].close()
    assert (tmp_path / "canary").exists()


def test_a_class_that_another_package_declared_harmless_is_refused_all_the_same(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([Path, type(tmp_path)])
    before = set(torch.serialization.get_safe_globals())
    try:
        path = write_raw(tmp_path / "x.pt", lambda content: content["best"].update(there=tmp_path))
        with pytest.raises(CheckpointError, match="UnpicklingError"):
            load_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before - {Path, type(tmp_path)}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "x.pt")


# Names, order and retention


def test_checkpoints_are_ordered_by_the_number_in_their_name(tmp_path: Path) -> None:
    names = ["step_10000.pt", "step_9500.pt", "step_0500.pt", "step_7.pt", "step_00000000008.pt"]
    foreign = ["step_5.pt.bak", "step_.pt", "xstep_5.pt", "step_5.PT", "step_-5.pt", "step_٣.pt", "step_5.pt\n", "5.pt"]
    for name in names + foreign:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step_6.pt").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[i] for i in (3, 4, 2, 1, 0)]


def test_clocks_have_no_say_in_what_is_newest_and_what_goes(tmp_path: Path) -> None:
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
    with pytest.raises(ResourceError, match=r"step_0001\.pt - it cannot be removed: Input/output error"):
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
        note_best(tmp_path, save_steps(tmp_path, step)[0], step, loss)
    found = json.loads((tmp_path / "best.json").read_bytes())
    assert found == {"file": f"step_{best:04d}.pt", "step": best, "validation_loss": losses[best - 1]}


def test_a_best_that_is_gone_or_damaged_gives_way(tmp_path: Path) -> None:
    first, second = save_steps(tmp_path, 1, 2)
    note_best(tmp_path, first, 1, 1.0)
    first.unlink()
    note_best(tmp_path, second, 2, 9.0)
    assert json.loads((tmp_path / "best.json").read_bytes())["step"] == 2
    (tmp_path / "best.json").write_text('{"file": "../x"}')
    note_best(tmp_path, second, 2, 9.0)
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
            note_best(self.folder, self.path(self.step), self.step, loss)
            if self.best not in self.valid | self.damaged or loss < self.losses[self.best]:  # type: ignore[index]
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


# Sentences and sums


def test_a_missing_checkpoint_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    save_steps(tmp_path, 500, 1000)
    path = tmp_path / "step_XXXX.pt"
    expected = f"{path} - there is no such file; XXXX stands for the number of a step - {tmp_path} holds step_0500.pt, step_1000.pt"
    assert describe_missing(path) == expected
    with pytest.raises(CheckpointError, match=r"holds step_0500\.pt, step_1000\.pt"):
        load_checkpoint(path)


def test_a_folder_in_place_of_a_checkpoint_is_answered_with_what_it_holds(tmp_path: Path) -> None:
    save_steps(tmp_path, 500)
    with pytest.raises(CheckpointError, match=f"{tmp_path} - it is a folder - {tmp_path} holds step_0500.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["step_1.pt", "absent/step_1.pt"])
def test_a_missing_checkpoint_beside_none_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert describe_missing(path) == (
        f"{path} - there is no such file, and {path.parent} holds no checkpoint - train first, or name another file"
    )


def test_of_many_checkpoints_the_newest_are_named(tmp_path: Path) -> None:
    for step in range(25):
        (tmp_path / f"step_{step:04d}.pt").write_bytes(b"")
    sentence = describe_missing(tmp_path / "x.pt")
    assert "step_0004.pt" not in sentence and sentence.endswith("step_0024.pt, and 5 older ones")


def test_a_name_that_no_system_takes_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it cannot be read: File name too long"):
        load_checkpoint(tmp_path / ("x" * 300))


def one_bit_more(state: dict[str, Any]) -> None:
    state["model"]["model.norm.weight"].view(torch.int16)[2] ^= 1


def another_type(state: dict[str, Any]) -> None:
    weight: Tensor = state["model"]["model.norm.weight"]
    state["model"]["model.norm.weight"] = weight.view(torch.float16)


def another_shape(state: dict[str, Any]) -> None:
    weight: Tensor = state["model"]["model.norm.weight"]
    state["model"]["model.norm.weight"] = weight.view(2, 2)


@pytest.mark.parametrize("change", [one_bit_more, another_type, another_shape, lambda state: state.update(step=2)])
def test_the_content_hash_sees_each_difference(change: Callable[[dict[str, Any]], None]) -> None:
    state = small_state()
    change(state)
    assert content_hash(state) != content_hash(small_state())


def test_the_content_hash_does_not_see_the_order_of_entries() -> None:
    state = small_state()
    assert content_hash(state) == content_hash(dict(reversed(state.items())))


def test_the_production_disk_is_not_watched() -> None:
    assert type(IO_OPS) is IoOps
