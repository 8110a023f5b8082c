"""`smollm2 prepare`: what it makes, what it prints, and the preview."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import check_refused
from runs import TINY, tiny_config, write_tiny

from smollm2.cli.main import main
from smollm2.cli.prepare import COLORS, CONTEXT, END, RESET, show_window
from smollm2.data.store import open_tokens, prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import load_tokenizer
from smollm2.data.windows import Windows
from smollm2.training.loop import train

TEXT = "ab\fcd"


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    """Windows of 4 tokens, every 3, over `ab`, an end, `cd` and an end."""
    (tmp_path / "a.txt").write_text(TEXT)
    text = open_text(str(tmp_path / "a.txt"), tmp_path, "\f")
    return Windows(prepare_tokens(text, load_tokenizer("bytes"), tmp_path, 0.0).train, 4, 3, 257)


def test_a_token_that_is_not_trained_on_is_in_parentheses_and_a_document_has_its_end(windows: Windows) -> None:
    shown = ["".join(show_window(windows, i, load_tokenizer("bytes"), in_color=False)) for i in range(len(windows))]
    assert shown == ["(a)|b|<end of document>|c|d|", "(c)|(d)|<end of document>|"]


def test_on_a_terminal_two_colours_take_turns_context_is_dim_and_an_end_inverted(windows: Windows) -> None:
    first, second, end, *_ = show_window(windows, 0, load_tokenizer("bytes"), in_color=True)
    assert first == f"{COLORS[0]}{CONTEXT}a{RESET}" and second == f"{COLORS[1]}b{RESET}"
    assert end == f"{END}<end of document>{RESET}"


def test_it_makes_what_training_then_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, config=TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    assert "epochs        0.90 in 12 steps of 8 windows" in shown and "window 0 of 107\n(t)|h|e| |q|u" in shown
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
