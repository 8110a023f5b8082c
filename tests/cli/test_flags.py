"""What the commands share: values that begin with a dash, escapes, bounds and paths."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from smollm2.cli.flags import file_path, number, path, separator, unescape, whole_number
from smollm2.cli.main import build_parser
from smollm2.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["generate", "m", "--prompt", "-x"], "prompt", "-x"),
        (["generate", "m", "--prompt", "--x y"], "prompt", "--x y"),
        (["generate", "m", "--prompt=-x"], "prompt", "-x"),
        (["generate", "m", "--stop", "-", "--prompt", "a"], "stop", ["-"]),
        (["evaluate", "m", "--input_file", "-"], "input_file", "-"),
        (["evaluate", "m", "--input_file", "-", "--document_separator", "--\\n"], "document_separator", "--\n"),
        (["train", "--training.learning_rate", "-1e-4"], "training.learning_rate", "-1e-4"),
    ],
)
def test_a_value_may_begin_with_a_dash(words: list[str], name: str, value: object) -> None:
    args, unknown = build_parser().parse_known_args(words)
    assert (getattr(args, name), unknown) == (value, [])


def test_a_flag_is_not_taken_as_the_value_of_another() -> None:
    with pytest.raises(ConfigError, match="--prompt: expected one argument"):
        build_parser().parse_known_args(["generate", "m", "--prompt", "--json"])


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"\n\n", "\n\n"),
        (r"\f", "\f"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        (r"\d", r"\d"),
        ("\\", "\\"),
        ("<|end|>", "<|end|>"),
        ("\n", "\n"),
    ],
)
def test_escapes_become_characters_once(typed: str, text: str) -> None:
    assert unescape(typed) == text


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["evaluate", "m", "--input_file", "t", "--document_separator", r"\n\f\t"], "document_separator"),
        (["generate", "m", "--stop", r"\n\f\t"], "stop"),
    ],
)
def test_every_command_that_takes_text_to_search_for_reads_the_same_escapes(words: list[str], name: str) -> None:
    value = getattr(build_parser().parse_known_args(words)[0], name)
    assert value in ("\n\f\t", ["\n\f\t"])


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (whole_number(1, 8), "0"),
        (whole_number(1, 8), "9"),
        (whole_number(1, 8), "1.5"),
        (whole_number(1, 8), "x"),
        (whole_number(1, 8), "9" * 5000),
        (number(0.1, 8), "nan"),
        (number(0.1, 8), "inf"),
        (number(0.1, 8), "0"),
        (number(0.1, 8), "1e-45"),
        (number(0.1, 8, or_zero=True), "-1"),
        (path, ""),
        (path, "a\0b"),
        (file_path, "."),
        (file_path, "/"),
        (separator, ""),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_value(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must "):
        read(text)


def test_zero_is_allowed_beside_a_range() -> None:
    assert number(0.1, 8, or_zero=True)("0") == 0


PATH_FLAGS = {
    "train": ["--config", "--checkpoint_path"],
    "generate": ["model", "--prompts_file"],
    "evaluate": ["models", "--input_file"],
    "export": ["model", "folder", "--input_file"],
    "convert": ["checkpoint", "target"],
    "landscape": ["model", "--input_file", "--output"],
    "replay": ["event"],
    "report": ["runs", "--output"],
}


@pytest.mark.parametrize(("command", "names"), PATH_FLAGS.items(), ids=PATH_FLAGS.keys())
def test_a_tilde_in_every_path_is_the_home_folder(
    command: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path("/home/somebody")))
    words = [part for name in names for part in ([name, "~/a"] if name.startswith("--") else ["~/a"])]
    if command == "evaluate" and "--input_file" not in words:
        words += ["--input_file", "x"]
    args = build_parser().parse_known_args([command, *words])[0]
    for name in names:
        assert getattr(args, name.lstrip("-")) in (str(Path("/home/somebody/a")), [str(Path("/home/somebody/a"))])
