"""What the commands share: the parser, value types, flags for the model and the device, and notes to standard error."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from smollm2.errors import ConfigError

ESCAPES = {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "\\": "\\"}

Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError, and whose flags accept values that begin with a dash."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        if match := re.match(r"argument COMMAND: invalid choice: '?([^' ]*)", message):
            raise ConfigError(f"{self.prog} {match[1]}", "unknown command", self._suggest_command(match[1]))
        if match := re.match(r"argument ([^:]+): (.*)", message, re.DOTALL):
            raise ConfigError(match[1].split("/")[-1], match[2], f"see {self.prog} --help")
        raise ConfigError(self.prog, message, f"see {self.prog} --help")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as argparse does, but read `--prompt "-x"` as a flag with its value."""
        return super().parse_known_args(self._join_values(sys.argv[1:] if args is None else args), namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")  # argparse before Python 3.13 drops it and returns an empty list
        return super()._get_values(action, arg_strings)

    def option_names(self) -> list[str]:
        """Return the flags that this parser knows."""
        return list(self._option_string_actions)

    def _join_values(self, words: Sequence[str]) -> list[str]:
        """Return the arguments, joining each value that begins with a dash, but is not a flag, to its flag."""
        joined: list[str] = []
        rest = iter(words)
        for word in rest:
            if word == "--":
                return [*joined, word, *rest]
            action = self._option_string_actions.get(word)
            value = next(rest, None) if action is not None and action.nargs is None else None
            if value is None:
                joined.append(word)
            elif value.startswith("-") and value.split("=")[0] not in self._option_string_actions:
                joined.append(f"{word}={value}")
            else:
                joined += [word, value]
        return joined

    def _suggest_command(self, name: str) -> str:
        commands = [command for action in self._actions for command in action.choices or () if action.dest == "command"]
        near = get_close_matches(name, commands, 1)
        return f"did you mean {self.prog} {near[0]}?" if near else f"use one of {', '.join(commands)}"


def add_command(
    commands: "Commands[Parser]", name: str, run: Callable[[argparse.Namespace], None], summary: str, text: str
) -> Parser:
    """Add `smollm2 NAME` and return its parser."""
    parser = commands.add_parser(name, help=summary, description=text, allow_abbrev=False)
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_model_flags(parser: Parser, exported: str = ", or a Hugging Face folder") -> None:
    """Add the argument that names a trained model."""
    text = f"a checkpoint, a run folder (its newest checkpoint){exported}"
    parser.add_argument("model", metavar="MODEL", type=path, help=text)
    parser.add_argument("--best", action="store_true", help="of a run folder, the checkpoint with the best validation")


def add_device_flag(parser: Parser) -> None:
    """Add the flag that chooses the device."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")


def choose_device(args: argparse.Namespace) -> str:
    """Return the device. Raise ConfigError if this machine does not have it."""
    import torch

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise ConfigError("--device", "PyTorch finds no CUDA GPU on this machine", "omit this flag, or use cpu")
    return args.device or ("cuda" if has_gpu else "cpu")


def path(text: str) -> str:
    """Return the path that a flag gives, with `~` expanded; shells expand it only in some positions."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises RuntimeError if there is no home folder
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path (got {text!r})")
    return expanded


def file_path(text: str) -> str:
    """Return the path of an output file; a folder such as `.` or `/` is refused."""
    if not Path(path(text)).name:
        raise argparse.ArgumentTypeError(f"must name a file (got {text!r})")
    return path(text)


def separator(text: str) -> str:
    r"""Return the text between two documents, with `\n`, `\r`, `\t`, `\f` and `\\` interpreted as in most languages."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return unescape(text)


def unescape(text: str) -> str:
    r"""Return text with its escapes `\n`, `\r`, `\t`, `\f` and `\\` replaced; any other backslash is kept."""
    return re.sub(r"\\([fnrt\\])", lambda match: ESCAPES[match[1]], text)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for a whole number from `low` to `high`."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,30}", text) else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,} (got {text!r})")
        return value

    return read


def number(low: float, high: float, *, or_zero: bool = False) -> Callable[[str], float]:
    """Return an argparse type for a number from `low` to `high`; with `or_zero`, 0 is allowed too."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high or (or_zero and value == 0)):
            zero = "0, or " if or_zero else ""
            raise argparse.ArgumentTypeError(f"must be {zero}a number from {low:g} to {high:g} (got {text!r})")
        return value

    return read


def print_note(message: str) -> None:
    """Print a line to standard error, to keep standard output for the results."""
    print(message, file=sys.stderr, flush=True)
