"""Checkpoints that are damaged, foreign or incomplete are refused by name."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import save_steps, set_weight, write_raw

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import ENTRIES, content_hash
from smollm2.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refusals)
    assert harmless <= at_most_harmless


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"not a checkpoint", "is damaged, or is not a checkpoint of this program"),
        (bytes(10_000), "is damaged, or is not a checkpoint of this program"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    """Promise A6."""
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_without_any_one_entry_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Promise B6."""

    def remove(content: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            content = content[parent]
        del content[last]

    reason = "not a checkpoint of this program" if name == "format" else f"{name} is missing"
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write_raw(tmp_path / "x.pt", remove))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_another_type_is_refused_by_name(tmp_path: Path, name: str) -> None:
    def spoil(content: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            content = content[parent]
        content[last] = None

    reason = "not a checkpoint of this program" if name == "format" else f"{name} is of type NoneType, but must be a"
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write_raw(tmp_path / "x.pt", spoil))


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.pt", lambda content: content.update(format="smollm2-train/2"))
    with pytest.raises(
        CheckpointError, match=r"'smollm2-train/2', but this version reads 'smollm2-train/1'; use a newer"
    ):
        load_checkpoint(path)


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
            r"'model\.norm\.weight' in model contains values that are not finite",
        ),
        (set_weight(torch.ones(1).expand(10**12)), "is a tensor whose storage has another size"),
        (set_weight(torch.ones(100)[:4]), "is a tensor whose storage has another size"),
        (set_weight(torch.ones(3, 3).to_sparse()), "which is not allowed in a checkpoint"),
        (set_weight(torch.ones(3, 3, device="meta")), "which is not allowed in a checkpoint"),
        (set_weight(torch.nn.Parameter(torch.ones(3))), "which is not allowed in a checkpoint"),
        (set_weight(1.0), "in model is not a tensor"),
        (
            lambda content: content["tied"].append(["lm_head.weight", "nothing"]),
            "tied does not consist of pairs of tensor names",
        ),
        (lambda content: content["optimizer"]["adamw"].pop("parameters"), "'adamw': parameters is missing"),
        (lambda content: content["optimizer"].update(muon=1), "optimizer.'muon' is of type int"),
        (
            lambda content: content["optimizer"].update(muon={"arithmetic": "2"}),
            "optimizer.muon.arithmetic is of type str",
        ),
        (
            lambda content: content["best"].update(there={1, 2}),
            "'best.there' is of type set, which is not allowed in a checkpoint",
        ),
        (lambda content: content["best"].update({"\x1b[2J": {1}}), r"'best.\\x1b\[2J' is of type set"),
        (lambda content: content["best"].update({1.5: 1}), "has a key of type float, which is not allowed"),
        (nest_ten_to_the_twelve_times, "is nested too deeply, or contains itself"),
        (nest_in_itself, "is nested too deeply, or contains itself"),
    ],
)
def test_a_content_that_no_save_writes_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], reason: str
) -> None:
    """Promise G2."""
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(write_raw(tmp_path / "x.pt", spoil))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "x.pt")
