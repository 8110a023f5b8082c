"""`smollm2 evaluate`: loss, perplexity and bits per byte of a model on a text, or its scores in tasks of lm-eval."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2.cli import tasks
from smollm2.cli.flags import (
    Commands,
    Parser,
    add_command,
    add_device_flag,
    choose_device,
    path,
    print_note,
    separator,
    whole_number,
)
from smollm2.errors import ConfigError

if TYPE_CHECKING:
    from smollm2.config.data_section import DataConfig
    from smollm2.inference.evaluation import Comparison

SHOWN_DOCUMENTS = 20
"""The maximum number of rows in the table of `--per_document`."""


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 evaluate`."""
    text = (
        "Score each token of a text once, in windows of the trained length, and print the loss; of conversations, those of "
        "the assistant's turns. Several models are compared. With --tasks, run tasks of lm-eval instead."
    )
    summary = "loss, perplexity and bits per byte of models on a text; scores in tasks of lm-eval"
    parser = add_command(commands, "evaluate", run, summary, text)
    text = (
        "a .pt file, a run folder (its newest checkpoint) or a Hugging Face folder; several are compared with the first"
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", type=path, help=text)
    parser.add_argument("--best", action="store_true", help="of a run folder, the checkpoint with the best validation")
    add_device_flag(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "text or conversations: a file, folder, pattern or hub name; - is standard input"
    source.add_argument("--input_file", metavar="FILE", type=path, help=text)
    source.add_argument("--tasks", metavar="NAMES", type=tasks.task_names, help=tasks.HELP)
    tasks.add_task_flags(parser)
    text = "tokens of a window; default: as many as the model was trained on"
    parser.add_argument("--context", type=whole_number(1, 2**24), metavar="N", help=text)
    text = "tokens between two windows; default: half the context"
    parser.add_argument("--stride", type=whole_number(1, 2**24), metavar="N", help=text)
    text = "windows, or requests of tasks, in one forward pass; default: 8"
    parser.add_argument("--batch_size", type=whole_number(1, 10**6), default=8, metavar="N", help=text)
    text = r"text between two documents, such as \f or \n\n; default: as the checkpoint was trained"
    parser.add_argument("--document_separator", metavar="TEXT", type=separator, help=text)
    text = "of JSONL and parquet, the field that holds the text; default: as the checkpoint was trained, or guessed"
    parser.add_argument("--text_field", metavar="NAME", help=text)
    text = (
        "a line of JSONL that cannot be used ends the command, or is left out; default: as the checkpoint was trained"
    )
    parser.add_argument("--on_bad_line", choices=("stop", "skip"), help=text)
    parser.add_argument("--per_document", action="store_true", help="score each document alone, and list them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Score the text with each model and print the tables and comparisons, or one JSON object."""
    tasks.check_flags(args)
    if args.tasks:
        tasks.run(args)
        return
    from smollm2.inference.evaluation import compare_evaluations

    if args.input_file == "-" and len(args.models) > 1:
        raise ConfigError("--input_file", "standard input can be read for one model only", "give a file")
    results, data = [], None
    for name in args.models:  # all by the data section of the first, so that they score the same targets
        found, data = evaluate_model(args, name, data)
        results.append(found)
    comparisons = [compare_evaluations(results[0], other) for other in results[1:]] if len(results) > 1 else []
    for found in results:
        found.pop("scores", None)
    if args.json and not comparisons:
        print(json.dumps(results[0]))
        return
    if args.json:
        rows = [{"model": name, **found} for name, found in zip(args.models, results, strict=True)]
        differences = [comparison and dataclasses.asdict(comparison) for comparison in comparisons]
        print(json.dumps({"models": rows, "differences": differences}))
        return
    for name, found in zip(args.models, results, strict=True):
        if comparisons:
            print(f"{name}:")
        print("\n".join(describe_evaluation(found)))
    for name, comparison in zip(args.models[1:], comparisons, strict=True):
        print(describe_comparison(args.models[0], name, comparison))


def evaluate_model(
    args: argparse.Namespace, name: str, data: "DataConfig | None"
) -> tuple[dict[str, Any], "DataConfig"]:
    """Return the evaluation of one model, and the data section that it follows: `data`, or the one of its training."""
    from smollm2.config.data_section import DataConfig
    from smollm2.data.sources import Rules
    from smollm2.inference.evaluation import evaluate
    from smollm2.inference.loading import load_source, read_config

    device = choose_device(args)
    model, tokenizer, state = load_source(Path(name), best=args.best, report=print_note)
    if data is None:
        data = read_config(state, Path(name)).data if state else DataConfig()
    rules = Rules(
        args.document_separator or data.document_separator,
        text_field=args.text_field or data.text_field,
        skips_bad_lines=(args.on_bad_line or data.on_bad_line) == "skip",
    )
    del state  # frees the optimizer's moments, two thirds of a checkpoint
    found = evaluate(
        model.to(device),
        tokenizer,
        Path(args.input_file),
        batch_size=args.batch_size,
        context=args.context,
        stride=args.stride,
        rules=rules,
        per_document=args.per_document,
        document_mask=data.document_mask,
        train_on=data.train_on,
        report=print_note,
        keep_scores=len(args.models) > 1,
    )
    return found, data


def describe_comparison(first: str, second: str, comparison: "Comparison | None") -> str:
    """Return the line that compares two models."""
    if comparison is None:
        return (
            f"{second}: not comparable part by part with {first}, because the parts hold other text: give --context and "
            "--stride, or --per_document if the tokenizers differ"
        )
    if not comparison.difference:
        return f"{second} and {first} are equal in bits per byte, over {comparison.parts:,} parts"
    better = "better" if comparison.difference < 0 else "worse"
    bounds = f", 95 %: {comparison.interval[0]:+.4f} to {comparison.interval[1]:+.4f}" if comparison.interval else ""
    chance = "" if comparison.is_significant else "; this may be chance"
    return (
        f"{second} is {better} than {first} by {abs(comparison.difference):.4f} bits per byte "
        f"({comparison.difference:+.4f}{bounds}){chance}"
    )


def describe_evaluation(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of one model's table."""
    for name, unit in (("loss", "nats per token"), ("perplexity", ""), ("bits_per_byte", "")):
        interval = found[f"{name}_interval"]
        bounds = f"  95 %: {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        yield f"{name:<16}{found[name]:>12.4f}{bounds}{f'  {unit}' if unit else ''}"
    yield f"{'tokens':<16}{found['tokens']:>12,}  in {found['parts']:,} {found['unit']}, context {found['context']:,}, stride {found['stride']:,}"
    yield f"{'bytes':<16}{found['bytes']:>12,}"
    if found["unencodable_bytes"]:
        yield f"{found['unencodable_bytes']:,} bytes of the text cannot be encoded by this tokenizer and were not scored"
    documents = found.get("documents", [])
    if documents:
        yield f"\n{'document':>8}{'loss':>12}{'perplexity':>14}{'bits_per_byte':>15}{'tokens':>12}"
    for number, row in enumerate(documents[:SHOWN_DOCUMENTS], 1):
        yield f"{number:>8}{row['loss']:>12.4f}{row['perplexity']:>14.4f}{row['bits_per_byte']:>15.4f}{row['tokens']:>12,}"
    if len(documents) > SHOWN_DOCUMENTS:
        yield f"and {len(documents) - SHOWN_DOCUMENTS:,} more; --json lists all"
