"""`smollm2 prepare`: what it makes, what it prints, and the preview."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import check_refused
from runs import TINY, tiny_config, write_tiny

from smollm2.cli.main import main
from smollm2.cli.prepare import COLORS, CONTEXT, END, RESET, show_window
from smollm2.config.reading import load_config
from smollm2.data.building import prepare_tokens
from smollm2.data.store import open_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import load_tokenizer
from smollm2.data.windows import Windows
from smollm2.plan.arithmetic import count_parameters
from smollm2.training.loop import train

TEXT = "ab\fcd"


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    """Windows of 4 tokens, every 3, over `ab`, an end, `cd` and an end."""
    (tmp_path / "a.txt").write_text(TEXT)
    text = open_text(str(tmp_path / "a.txt"), tmp_path, "\f")
    return Windows(prepare_tokens(text, load_tokenizer("bytes"), tmp_path, 0.0).train, 4, 3, 257)


def test_a_token_that_is_not_trained_on_is_in_parentheses_and_a_document_has_its_end(windows: Windows) -> None:
    shown = [
        "".join(show_window(windows.read(i), load_tokenizer("bytes"), in_color=False)) for i in range(len(windows))
    ]
    assert shown == ["(a)|b|<end of document>|c|d|", "(c)|(d)|<end of document>|"]


def test_on_a_terminal_two_colours_take_turns_context_is_dim_and_an_end_inverted(windows: Windows) -> None:
    first, second, end, *_ = show_window(windows.read(0), load_tokenizer("bytes"), in_color=True)
    assert first == f"{COLORS[0]}{CONTEXT}a{RESET}" and second == f"{COLORS[1]}b{RESET}"
    assert end == f"{END}<end of document>{RESET}"


def test_it_makes_what_training_then_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, config=TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"epochs +0\.90\n", shown) and "input: window 0 of 107\n(t)|h|e| |q|u" in shown
    folder = Path(next(line for line in shown.splitlines() if "token folder" in line).split()[-1])
    assert open_tokens(folder) is not None
    assert not (tmp_path / "checkpoints").exists()
    train(tiny_config(tmp_path, training__train_steps=1))
    assert "tokenizing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--preview", "many"], 2, "--preview: must be"),
        (["--no_such"], 2, "--no_such: unknown"),
        (["--input_file", "absent.txt"], 3, "absent.txt: file not found"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    flags: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    check_refused(["prepare", *flags], code, words, tmp_path, capsys)


def test_it_does_not_import_torch(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    program = "import sys; from smollm2.cli.main import main; main(['prepare']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_tokenizers_are_compared_on_the_text_and_nothing_else_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, config=TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--model.vocab_size", "300", "--compare_tokenizers", "bytes", "auto"]) == 0
    shown = capsys.readouterr().out
    parameters = count_parameters(load_config("config.yaml").with_vocab_size(257).model)
    assert f"bytes  257 ids, 1.00 bytes per token, 0.00% unencodable; {parameters:,} parameters, 31%" in shown
    assert " 300 ids, " in shown and "Prepared" not in shown
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_checksums_are_verified_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, config=TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--verify"]) == 0
    assert "shards verified by their checksums: 1" in capsys.readouterr().out
    (shard,) = (tmp_path / "cache").glob("*/train-*.bin")
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\2")
    assert main(["prepare", "--verify"]) == 3
    assert "the ids do not have the shard's checksum" in capsys.readouterr().err


def test_a_mixture_is_prepared_and_shown_source_by_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, config=TINY)
    (tmp_path / "other.txt").write_text("another text, " * 300)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--preview", "1", "--data.mixture", "{input.txt: 0.75, other.txt: 0.25}"]) == 0
    shown = capsys.readouterr().out
    assert "input: epochs           0.67" in shown and "other: epochs           0.20" in shown
    assert "input: window 0 of 107\n" in shown and "other: window 0 of 119\n(a)|n|o|t|h|e|r|" in shown
