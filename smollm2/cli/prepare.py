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
    from smollm2.data.batches import Batches
    from smollm2.data.corpus import Corpus
    from smollm2.data.store import TokenStore
    from smollm2.data.tokenizer import Tokenizer
    from smollm2.data.windows import Batch

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
    text = "also read all shards of tokens and compare them with their checksums"
    parser.add_argument("--verify", action="store_true", help=text)
    text = "only compare tokenizers on the text: auto, bytes, folders or hub names"
    parser.add_argument("--compare_tokenizers", nargs="+", default=[], metavar="NAME", help=text)
    add_run_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Prepare the text, and print what was found and where the tokens are."""
    config, origins = load_run_config(args, args.unknown)
    from smollm2.data.corpus import Listener, open_corpus
    from smollm2.tracking.console import ConsoleTracker

    console = ConsoleTracker(0, 0)
    listener = Listener(console.report, console.show_progress)
    if args.compare_tokenizers:
        from smollm2.data.tokenizer_comparison import compare_tokenizers

        found = compare_tokenizers(config, args.compare_tokenizers, listener)
        console.show_page("Tokenizers", [(one.name, one.describe()) for one in found])
        return
    corpus = open_corpus(config, listener, is_chosen=is_input_chosen(config, origins))
    batches = corpus.batches(config)
    for line in corpus.describe(batches):
        console.report(line)
    if args.verify:
        console.report(f"shards verified by their checksums: {sum(store.verify() for store in corpus.stores):,}")
    console.show_page("Prepared", list_facts(config, corpus, batches))
    for name, windows in zip(corpus.names, batches.windows.sources, strict=True):
        for number in range(min(args.preview, len(windows))):
            print(f"\n{name}: window {number:,} of {len(windows):,}")
            print("".join(show_window(windows.read(number), corpus.tokenizer, in_color=sys.stdout.isatty())))


def list_facts(config: Config, corpus: "Corpus", batches: "Batches") -> list[tuple[str, str]]:
    """Return the rows of the table: what a run with this config will read."""
    from smollm2.data.overview import measure_overlaps

    s, t = corpus.statistics, config.training
    epochs = batches.epochs_of(t.train_steps)
    rows = [
        ("documents", f"{s.documents:,}, and {s.blank_documents:,} blank ones that were dropped"),
        ("tokens", f"{s.train_tokens:,} for training, {s.validation_tokens:,} for validation"),
        ("tokenizer", f"{corpus.tokenizer.vocab_size:,} ids, {corpus.bytes_per_token:.2f} bytes per token"),
        ("unencodable", f"{s.unknown_bytes:,} bytes in {s.unknown_documents:,} documents"),
        ("steps", f"{t.train_steps:,} of {config.global_batch_size:,} windows"),
    ]
    found = zip(corpus.names, corpus.stores, epochs, measure_overlaps(corpus), strict=True)
    for name, store, count, overlap in found:
        prefix = f"{name}: " if len(epochs) > 1 else ""
        rows += [(f"{prefix}epochs", f"{count:.2f}"), (f"{prefix}token folder", str(store.folder))]
        rows += [(f"{prefix}{label}", text) for label, text in list_findings(store)]
        rows += [(f"{prefix}overlap", overlap.describe())] if store.validation else []
        rows += [("validation", str(store.other.folder))] if store.other else []
    return rows


def list_findings(store: "TokenStore") -> Iterator[tuple[str, str]]:
    """Yield rows about the documents of a source: their lengths and their duplicates."""
    summary = store.index.summary
    if not summary:
        return
    lengths, duplicates = summary["lengths"], summary["duplicates"]
    parts = (
        f"median {lengths['median']:,}, 95th percentile {lengths['percentile_95']:,}, longest {lengths['longest']:,}"
    )
    yield "document length", f"{parts} tokens"
    if duplicates["documents"]:
        share = f"{duplicates['token_share']:.1%} of the tokens"
        yield "copies", f"{duplicates['documents']:,} of earlier documents ({share})"


def show_window(window: "Batch", tokenizer: "Tokenizer", *, in_color: bool) -> Iterator[str]:
    """Yield the tokens of a window in turn: on a terminal in two colours, elsewhere with a bar between them.

    A token that is not a target is dim on a terminal and in parentheses elsewhere. The first token of the window is
    read and never predicted; padding is not shown.
    """
    import numpy as np

    used = np.flatnonzero((window.labels != IGNORE_INDEX) | (window.input_ids != 0))
    length = int(used[-1]) + 1
    shown = [(token, False) for token in window.input_ids[:1].tolist()]
    for at in range(length):
        label = int(window.labels[at])
        if label != IGNORE_INDEX:
            shown.append((label, True))
        elif at + 1 < length:
            shown.append((int(window.input_ids[at + 1]), False))
    for (token, is_target), color in zip(shown, itertools.cycle(COLORS)):
        yield show_token(token, tokenizer, is_target=is_target, color=color if in_color else "")


def show_token(token: int, tokenizer: "Tokenizer", *, is_target: bool, color: str) -> str:
    """Return a token as text, with its control characters escaped."""
    from smollm2.tracking.base import escape_controls

    is_end = token in (tokenizer.end_of_text, tokenizer.document_end)
    plain = tokenizer.decode([token])
    name = "<end of document>" if is_end and not tokenizer.chat_template else tokenizer.token(token)
    text = escape_controls(plain).replace("\n", "↵\n") if plain else name
    if not color:
        return f"{text if is_target else f'({text})'}|"
    return f"{END if is_end else color}{'' if is_target else CONTEXT}{text}{RESET}"
