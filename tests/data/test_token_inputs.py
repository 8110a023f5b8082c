"""Inputs that are tokens already: a store's folder, and the token files of other projects, from the command line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import check_refused
from runs import TINY, write_tiny

from smollm2.cli.main import main
from smollm2.data.token_inputs import find_token_input
from smollm2.data.tokenizer import tokenizer_from_text

BYTES = tokenizer_from_text("bytes")
IDS = [*b"the quick brown fox " * 200, 256]


def write_raw(folder: Path, name: str = "train.bin", ids: list[int] = IDS) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array(ids, "<u2").tobytes())
    return path


def write_llm_c(folder: Path) -> Path:
    path = folder / "fineweb_train_000001.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    path.write_bytes(header.tobytes() + np.array(IDS, "<u2").tobytes())
    return path


def write_ds(folder: Path) -> Path:
    path = write_raw(folder, "00000.ds")
    (folder / "00000.ds.index").write_bytes(np.array([len(IDS)], "<u8").tobytes())
    (folder / "00000.ds.metadata").write_text(f"bytes|2\n{len(IDS)}\n4.0 k")
    return path


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    write_tiny(folder, config=TINY)
    monkeypatch.chdir(folder)
    return main(["prepare", "--data.tokenizer", "bytes", *flags])


@pytest.mark.parametrize("write", [write_raw, write_llm_c, write_ds])
def test_token_files_are_read_in_place(
    write: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path)
    assert prepare(tmp_path, monkeypatch, "--input_file", str(path), "--preview", "1") == 0
    shown = capsys.readouterr().out
    assert "1 file of 4,001 tokens" in shown and "4,001 tokens: 3,601 for training, 400 for validation" in shown
    assert "(t)|h|e| |q|u" in shown
    assert not (tmp_path / "cache").exists()


def test_best_fit_needs_the_ends_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_raw(tmp_path)
    assert prepare(tmp_path, monkeypatch, "--input_file", str(path), "--data.pack", "best_fit") == 3
    assert "best_fit needs to know where documents end" in capsys.readouterr().err
    assert prepare(tmp_path, monkeypatch, "--input_file", str(write_ds(tmp_path)), "--data.pack", "best_fit") == 0


def test_a_store_is_an_input_with_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path, monkeypatch) == 0
    (store,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    store = store.rename(tmp_path / "elsewhere")
    (tmp_path / "input.txt").unlink()
    capsys.readouterr()
    assert main(["prepare", "--input_file", "elsewhere", "--data.tokenizer", "auto", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "elsewhere: a token store of 3,801 tokens" in shown and "257 ids" in shown
    assert "shards verified by their checksums: 1" in shown and str(store.name) in shown


def test_a_store_of_another_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2_tokenizer_folder: Path
) -> None:
    assert prepare(tmp_path, monkeypatch) == 0
    (store,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    flags = ["--input_file", str(store), "--data.tokenizer", str(smollm2_tokenizer_folder)]
    assert main(["prepare", *flags]) == 3
    assert "made these tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["train.bin", "val.bin"], ["train.bin"]),
        (
            ["fineweb_val_0.bin", "fineweb_train_2.bin", "fineweb_train_1.bin"],
            ["fineweb_train_1.bin", "fineweb_train_2.bin"],
        ),
        (["b.bin", "a.bin", ".hidden.bin"], ["a.bin", "b.bin"]),
        (["a.bin", "notes.txt"], []),
        (["notes.txt"], []),
    ],
)
def test_of_a_folder_of_token_files_the_training_split_is_read(
    files: list[str], found: list[str], tmp_path: Path
) -> None:
    for name in files:
        write_raw(tmp_path, name)
    assert [path.name for path in find_token_input(str(tmp_path))] == found


@pytest.mark.parametrize(
    ("change", "flags", "code", "words"),
    [
        (
            lambda path: path,
            ["--data.tokenizer", "auto"],
            2,
            "data.tokenizer: token files need the tokenizer that made them",
        ),
        (lambda path: path.write_bytes(b""), [], 3, "train.bin: the file is empty"),
        (lambda path: path.write_bytes(b"abc"), [], 3, "is not a multiple of 2 bytes"),
        (lambda path: path.write_bytes(b"PK\3\4" * 99), [], 3, "this is a zip archive"),
        (
            lambda path: path.write_bytes(b"\xff\xff" * 99),
            ["--preview", "1"],
            3,
            "has id 65535, but the vocabulary size is 257",
        ),
    ],
    ids=["no tokenizer", "empty", "odd", "zip", "id"],
)
def test_token_files_that_do_not_fit_are_one_line(
    change: Callable[[Path], object],
    flags: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny(tmp_path, config=TINY)
    monkeypatch.chdir(tmp_path)
    change(write_raw(tmp_path))
    check_refused(["prepare", "--input_file", "train.bin", *flags], code, words, tmp_path, capsys)
