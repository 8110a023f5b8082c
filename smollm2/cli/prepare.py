"""`smollm2 prepare`: read and tokenize a run's text ahead of time, and show it as the model will see it."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from smollm2.cli.flags import Commands, Parser, add_command, whole_number
from smollm2.cli.run_flags import add_run_flags, load_run_config
from smollm2.config.reading import is_input_chosen
from smollm2.config.schema import IGNORE_INDEX, Config

if TYPE_CHECKING:
    from smollm2.data.store import TokenStore
    from smollm2.data.tokenizer import Tokenizer
    from smollm2.data.windows import Windows

COLORS = ("\x1b[48;5;254m\x1b[38;5;16m", "\x1b[48;5;153m\x1b[38;5;16m")
"""Backgrounds of the tokens in turn, with a text colour that is legible on both."""

CONTEXT, END, RESET = "\x1b[2m", "\x1b[7m", "\x1b[0m"
"""Dim for tokens that are not trained on, inverse for the end of a document, and back to normal."""


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 prepare`."""
    text = "Read the text, train its tokenizer and write its tokens, as train does before its first step. Takes the flags of train."
    parser = add_command(commands, "prepare", run, "read and tokenize a text ahead of time, and preview it", text)
    text = "also show the first N windows of training, token by token"
    parser.add_argument("--preview", type=whole_number(1, 1000), default=0, metavar="N", help=text)
    add_run_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Prepare the text, and print what was found and where the tokens are."""
    config, origins = load_run_config(args, args.unknown)
    from smollm2.data.corpus import Listener, open_corpus, training_windows
    from smollm2.tracking.console import ConsoleTracker

    console = ConsoleTracker(0, 0)
    listener = Listener(console.report, console.show_progress)
    tokenizer, store = open_corpus(config, listener, is_chosen=is_input_chosen(config, origins))
    windows = training_windows(config, tokenizer, store)
    console.report(store.statistics.describe(windows))
    console.show_page("Prepared", list_facts(config, tokenizer, store, windows))
    for number in range(min(args.preview, len(windows))):
        print(f"\nwindow {number:,} of {len(windows):,}")
        print("".join(show_window(windows, number, tokenizer, in_color=sys.stdout.isatty())))


def list_facts(
    config: Config, tokenizer: "Tokenizer", store: "TokenStore", windows: "Windows"
) -> list[tuple[str, str]]:
    """Return the rows of the table: what a run with this config will read."""
    from smollm2.data.batches import Batches

    s, t = store.statistics, config.training
    epochs = Batches(windows, t.seed, config.global_batch_size).epoch_of(t.train_steps)
    return [
        ("documents", f"{s.documents:,}, and {s.blank_documents:,} blank ones that were dropped"),
        ("tokens", f"{s.train_tokens:,} for training, {s.validation_tokens:,} for validation"),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids, {s.bytes / s.tokens:.2f} bytes per token"),
        ("unencodable", f"{s.unknown_bytes:,} bytes in {s.unknown_documents:,} documents"),
        ("epochs", f"{epochs:.2f} in {t.train_steps:,} steps of {config.global_batch_size:,} windows"),
        ("token folder", str(store.folder)),
        *([("validation", str(store.validation_folder))] if store.validation_folder else []),
    ]


def show_window(windows: "Windows", number: int, tokenizer: "Tokenizer", *, in_color: bool) -> Iterator[str]:
    """Yield the tokens of a window in turn: on a terminal in two colours, elsewhere with a bar between them.

    A token that is not a target is dim on a terminal and in parentheses elsewhere. The first token of the window is
    read and never predicted.
    """
    first = number * windows.stride
    ids = windows.tokens[first : first + windows.length + 1].tolist()
    are_targets = [False, *(windows.read(number).labels != IGNORE_INDEX).tolist()]
    for token, is_target, color in zip(ids, are_targets, itertools.cycle(COLORS)):
        yield show_token(token, tokenizer, is_target=is_target, color=color if in_color else "")


def show_token(token: int, tokenizer: "Tokenizer", *, is_target: bool, color: str) -> str:
    """Return a token as text, with its control characters escaped."""
    from smollm2.tracking.base import escape_controls

    is_end = token == tokenizer.end_of_text
    text = "<end of document>" if is_end else escape_controls(tokenizer.decode([token])).replace("\n", "↵\n")
    if not color:
        return f"{text if is_target else f'({text})'}|"
    return f"{END if is_end else color}{'' if is_target else CONTEXT}{text}{RESET}"
