"""Files that were made to run code or to fill the memory are refused, and nothing of them runs."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from io_faults import exit_code_in_a_fork
from safetensors.torch import save_file
from states import save_steps, set_weight, write_raw

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import FORMAT
from smollm2.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_steps(tmp_path_factory.mktemp("sound"), 1)[0].read_bytes()


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
    with pytest.raises(CheckpointError, match=f"^{path}: ") as raised:
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
        with pytest.raises(CheckpointError, match=r"archive that is compressed|is nested|storage has another size"):
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
