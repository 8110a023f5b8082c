"""`smollm2 generate`: text from a checkpoint or an exported folder."""

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2.cli.flags import (
    Commands,
    Parser,
    add_command,
    add_device_flag,
    add_model_flags,
    choose_device,
    number,
    path,
    print_note,
    unescape,
    whole_number,
)
from smollm2.errors import ConfigError, DataError

if TYPE_CHECKING:
    from smollm2.data.tokenizer import Tokenizer
    from smollm2.inference.generation import Piece, Prompt
    from smollm2.model.transformer import SmolLM2

Write = Callable[["Sequence[Prompt]", Sequence[int]], "Iterator[Piece]"]
"""A function from prompts and their seeds to pieces of generated text."""

NUMBERS: list[tuple[str, Callable[[str], float], float, str]] = [
    ("max_new_tokens", whole_number(1, 10**9), 256, "tokens to write at most"),
    # Below 0.001 the scaled logits of a float32 model overflow.
    ("temperature", number(1e-3, 1e3, or_zero=True), 0.8, "0 takes the likeliest token"),
    ("top_k", whole_number(0, 10**9), 50, "draw among the K likeliest tokens, 0: among all"),
    ("top_p", number(1e-6, 1), 1.0, "draw among the likeliest tokens that make up this probability"),
    ("min_p", number(0, 1), 0.0, "leave out tokens below this share of the likeliest one's probability"),
    ("repetition_penalty", number(0.01, 100), 1.0, "above 1: fewer repetitions"),
    ("samples", whole_number(1, 10**6), 1, "texts per prompt; the second has the next seed, and so on"),
    ("seed", whole_number(0, 2**62), 0, "the same model, prompt and seed give the same text"),
    ("batch_size", whole_number(1, 10**6), 8, "texts that are written together"),
]


PRECISIONS = ["float32", "bf16", "fp16"]


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 generate`."""
    text = (
        "Continue a prompt; without one, start a new document. Text goes to standard output, notes to standard error."
    )
    parser = add_command(commands, "generate", run, "text from a checkpoint or an exported folder", text)
    add_model_flags(parser)
    add_device_flag(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    text = 'JSON Lines, "text" or {"prompt": "text", ...}; - is standard input; writes JSON Lines'
    source.add_argument("--prompts_file", metavar="FILE", type=path, help=text)
    source.add_argument("--interactive", action="store_true", help="ask for prompts until the end of input")
    parser.add_argument("--json", action="store_true", help="write JSON Lines")
    add_number_flags(parser)
    text = r"end before this text, such as \n; repeatable"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", type=unescape, help=text)
    parser.add_argument("--precision", choices=PRECISIONS, help="default: float32; bf16 on a GPU")


def add_number_flags(parser: Parser, without: Sequence[str] = ()) -> None:
    """Add the flags of sampling, except some."""
    for name, kind, default, text in NUMBERS:
        if name not in without:
            parser.add_argument(
                f"--{name}", type=kind, default=default, metavar="N", help=f"{text}; default: {default}"
            )


def run(args: argparse.Namespace) -> None:
    """Generate text after each prompt and print it."""
    rows = read_prompts(args.prompts_file) if args.prompts_file else [{"prompt": args.prompt or ""}]
    if problem := find_bad_character(args.prompt or ""):
        raise ConfigError("--prompt", problem, "encode it as UTF-8")
    write = make_writer(args, *load_for_writing(args))
    if args.interactive:
        continue_prompts(args, write)
    elif args.prompts_file or args.json:
        write_json_lines(args, rows, write)
    else:
        write_texts(args, rows[0]["prompt"], write)


def load_for_writing(args: argparse.Namespace) -> "tuple[SmolLM2, Tokenizer]":
    """Return the model, on its device and in its precision, and its tokenizer."""
    import torch

    from smollm2.inference.loading import load_source
    from smollm2.runtime.precision import choose_precision, device_features

    device = choose_device(args)
    requested = args.precision or ("float32" if device == "cpu" else "auto")
    features = device_features(torch.device(device))
    precision = choose_precision(requested, device, features, "--precision", "omit this flag")
    model, tokenizer, _ = load_source(Path(args.model), best=args.best, report=print_note)
    model.to(device, precision.dtype)
    return model, tokenizer


def make_writer(
    args: argparse.Namespace, model: "SmolLM2", tokenizer: "Tokenizer", report: Callable[[str], None] = print_note
) -> Write:
    """Return the function that generates text as the flags say."""
    from smollm2.inference.generation import stream
    from smollm2.inference.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k or None, args.top_p, args.min_p, args.repetition_penalty)

    def write(prompts: "Sequence[Prompt]", seeds: Sequence[int]) -> "Iterator[Piece]":
        return stream(
            model,
            tokenizer,
            prompts,
            seeds,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            stop=args.stop,
            report=report,
        )

    return write


def read_prompts(name: str) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file, each with its `prompt`. Raise DataError, naming the invalid line."""
    return [read_row(where, value) for where, value in read_json_lines(name)]


def read_json_lines(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line that is not blank; None for a line that is not JSON.

    Raise DataError if the file cannot be read, or is not UTF-8.
    """
    shown = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        what, advice = f"cannot be read ({error.strerror})", "choose a JSON Lines file that can be read"
        raise DataError(name, what, advice) from None
    convert = "convert it: iconv -f WINDOWS-1252 -t UTF-8" + ("" if name == "-" else f" {shlex.quote(name)} > NEW")
    for count, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{shown}:{count}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line is {line[error.start]:#04x}, which is not UTF-8"
            raise DataError(where, what, convert) from None
        if text.strip():
            yield where, parse_line(text)


def parse_line(text: str) -> Any:
    """Return the value of a line of JSON, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_row(where: str, value: Any) -> dict[str, Any]:
    """Return the value of one line as a row. Raise DataError if it holds no prompt."""
    row = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(where, "is not a prompt", 'write "text" or {"prompt": "text"} on each line')
    if problem := find_bad_character(row["prompt"]):
        raise DataError(where, problem, "write the complete character")
    return row


def find_bad_character(text: str) -> str:
    """Return what is wrong with a prompt that is not valid Unicode, or an empty string."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python represents a command-line byte that it cannot decode
            return f"byte {code - 0xDC00:#04x} after {text[: error.start][-20:]!r} is not UTF-8"
        return f"\\u{code:04x} is half of a surrogate pair"
    return ""


def write_json_lines(args: argparse.Namespace, rows: Sequence[dict[str, Any]], write: Write) -> None:
    """Print one object for each prompt and sample, in order: the row plus its `text`, `end` and `seed`."""
    tasks = [{**row, "seed": args.seed + sample} for row in rows for sample in range(args.samples)]
    for start in range(0, len(tasks), args.batch_size):
        batch = [{**task, "text": "", "end": ""} for task in tasks[start : start + args.batch_size]]
        for piece in write([task["prompt"] for task in batch], [task["seed"] for task in batch]):
            batch[piece.index]["text"] += piece.text
            batch[piece.index]["end"] = piece.end
        for done in batch:
            print(json.dumps(done), flush=True)


def write_texts(args: argparse.Namespace, prompt: str, write: Write) -> None:
    """Print the prompt, and its continuation as it is generated; several samples follow one another."""
    for sample in range(args.samples):
        if args.samples > 1:
            print_note(f"sample {sample + 1}, seed {args.seed + sample}:")
        show(prompt)
        for piece in write([prompt], [args.seed + sample]):
            show(piece.text)
        show("\n")


def continue_prompts(args: argparse.Namespace, write: Write) -> None:
    """Ask for prompts; each turn uses the next seeds. Ctrl-C ends a text, Ctrl-D the loop."""
    print_note("Type a prompt and Enter. Ctrl-C ends a text, Ctrl-D the program.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if problem := find_bad_character(prompt):
            raise DataError("standard input", problem, "encode the prompts as UTF-8")
        try:
            write_texts(args, prompt, write)
        except KeyboardInterrupt:
            show("\n")
        args.seed = (args.seed + args.samples) % 2**62


def show(text: str) -> None:
    """Print generated text or a prompt; on a terminal, escape control characters, which the terminal would act on."""
    from smollm2.tracking.base import escape_controls

    print(escape_controls(text) if sys.stdout.isatty() else text, end="", flush=True)
