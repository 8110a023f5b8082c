"""`smollm2 generate`: its prompts and its bounds."""

import io
from pathlib import Path

import pytest

from smollm2.cli.generate import NUMBERS
from smollm2.cli.main import main

BAD_PROMPTS = {
    "latin 1": (
        b'"a"\n"caf\xe9"\n',
        ":2: byte 5 of the line is 0xe9, which is not UTF-8. Convert it: iconv -f WINDOWS-1252",
    ),
    "latin 1, plain": (b"caf\xe9", ":1: byte 4 of the line is 0xe9"),
    "half of a surrogate pair": (b'"a"\n\n"\\ud800"\n', ":3: \\ud800 is half of a surrogate pair."),
    "the same in an object": (b'{"prompt": "\\udc00"}\n', ":1: \\udc00 is half of a surrogate pair."),
    "not JSON": (b'"a"\nb\n', ':2: is not a prompt. Write "text" or {"prompt": "text"} on each line.'),
    "no prompt": (b'{"text": "a"}', ":1: is not a prompt."),
    "a byte order mark is fine": (b'\xef\xbb\xbf"a"\n1\n', ":2: is not a prompt."),
}


@pytest.mark.parametrize(("content", "words"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_file_is_named_with_its_line(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert main(["generate", "absent", "--prompts_file", str(tmp_path / "prompts.jsonl")]) == 3
    assert f"prompts.jsonl{words}" in capsys.readouterr().err


def test_standard_input_is_named_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'"caf\xe9"\n')))
    assert main(["generate", "absent", "--prompts_file", "-"]) == 3
    assert "standard input:1: byte 5 of the line is 0xe9" in capsys.readouterr().err


def test_a_prompt_that_is_not_utf_8_is_refused_by_its_byte(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "absent", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")]) == 2
    assert capsys.readouterr().err == "error: --prompt: byte 0xe9 after 'caf' is not UTF-8. Encode it as UTF-8.\n"


OUT_OF_RANGE = {
    "max_new_tokens": ["0", "-1", "x"],
    "temperature": ["-1", "1e-39", "1e-45", "nan", "inf", "1e39"],
    "top_k": ["-1", "1.5"],
    "top_p": ["0", "1.1", "nan", "1e-45"],
    "min_p": ["-0.1", "1.1", "nan"],
    "repetition_penalty": ["0", "1e-40", "inf", "nan"],
    "samples": ["0"],
    "seed": ["-1", str(2**63)],
    "batch_size": ["0"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in OUT_OF_RANGE.items() for text in texts])
def test_a_number_out_of_range_is_refused_with_its_flag(
    name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "absent", f"--{name}={text}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --{name}: must be ")
    assert f"(got '{text}')" in error


def test_every_number_is_in_the_table_above() -> None:
    assert [name for name, *_ in NUMBERS] == list(OUT_OF_RANGE)


@pytest.mark.parametrize(("name", "kind", "default"), [row[:3] for row in NUMBERS])
def test_each_default_is_in_range(name: str, kind: object, default: float) -> None:
    assert callable(kind) and kind(str(default)) == default
