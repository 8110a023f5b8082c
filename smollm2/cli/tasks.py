"""`smollm2 evaluate --tasks`: a model's scores in tasks of lm-eval, beside SmolLM2's published figures."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2.cli.flags import Parser, choose_device, path, print_note, whole_number
from smollm2.errors import ConfigError

if TYPE_CHECKING:
    from smollm2.inference.harness import Metric, Tasks

HELP = "tasks of lm-eval instead of a text, separated by commas, such as hellaswag,arc_easy"

OF_TEXTS = {"stride": None, "document_separator": None, "per_document": False}
OF_TASKS = {"tasks_folder": None, "limit": None, "num_fewshot": None}
"""Flags that only one of --input_file and --tasks has, with their defaults."""

SIZES = {"135M": 134_515_008, "360M": 361_821_120, "1.7B": 1_711_376_384}
"""The parameters of SmolLM2's base models."""


@dataclass(frozen=True)
class Published:
    """The published figures of the base models in a task, in the order of SIZES, to be compared with lm-eval's `metric`.

    `difference` says how lm-eval measures something else; it is empty if only spaces in the prompts differ.
    """

    metric: str
    figures: tuple[float | None, float | None, float | None]
    shots: int = 0
    difference: str = ""


ARC = Published("acc_norm", (0.439, 0.530, 0.605), difference="published is the mean of arc_easy and arc_challenge")

PUBLISHED = {
    "hellaswag": Published("acc_norm", (0.421, 0.545, 0.687)),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "piqa": Published("acc_norm", (0.684, 0.717, 0.776)),
    "openbookqa": Published("acc_norm", (0.346, 0.374, 0.422)),
    "winogrande": Published(
        "acc", (0.513, 0.525, 0.594), difference="lm-eval scores the end of the sentence, not the option"
    ),
    "commonsense_qa": Published("acc", (0.339, 0.380, 0.436), difference="lm-eval scores letters, not answers"),
    "mmlu_continuation": Published(
        "acc", (0.315, 0.358, None), difference="lm-eval has no topic line and does not normalise"
    ),
    "triviaqa": Published(
        "exact_match (remove_whitespace)", (0.041, 0.169, 0.367), difference="another prompt and other stop strings"
    ),
    "gsm8k": Published(
        "exact_match (strict-match)", (0.014, 0.032, 0.310), shots=5, difference="other examples in the prompt"
    ),
}
"""From the model cards and arXiv 2502.02737, as fractions like lm-eval's values."""


def task_names(text: str) -> list[str]:
    """Return the names in a list separated by commas, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must name a task (got {text!r})")
    return list(dict.fromkeys(names))


def add_task_flags(parser: Parser) -> None:
    """Add the flags that go with --tasks."""
    text = "task files (YAML) of your own; they can run Python code"
    parser.add_argument("--tasks_folder", metavar="FOLDER", type=path, help=text)
    parser.add_argument(
        "--limit", type=whole_number(1, 10**9), metavar="N", help="documents of each task; default: all"
    )
    text = "examples in each prompt; default: as the task says"
    parser.add_argument("--num_fewshot", type=whole_number(0, 1000), metavar="N", help=text)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError if a flag is given that --tasks, or --input_file, does not have."""
    used, other = ("--tasks", OF_TEXTS) if args.tasks else ("--input_file", OF_TASKS)
    for name, default in other.items():
        if getattr(args, name) != default:
            raise ConfigError(f"--{name}", f"has no effect with {used}", "omit it")


def run(args: argparse.Namespace) -> None:
    """Run the tasks with each model, and print a table for each, or one JSON object."""
    from smollm2.inference.harness import load_tasks
    from smollm2.inference.loading import load_source

    for name in args.models:
        if not Path(name).exists():
            load_source(Path(name), best=args.best)  # raises the error that it would raise after the tasks are loaded
    folder = Path(args.tasks_folder) if args.tasks_folder else None
    loaded = load_tasks(args.tasks, folder, print_note)
    results = [run_model(args, name, loaded) for name in args.models]
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else {"models": results}))
        return
    for found in results:
        if len(results) > 1:
            print(f"{found['model']}:")
        print("\n".join(describe_tasks(found["tasks"], choose_sizes(found["parameters"]))))


def run_model(args: argparse.Namespace, name: str, loaded: "Tasks") -> dict[str, Any]:
    """Return the results of one model, as printed by --json."""
    from smollm2.inference.evaluation import choose_context
    from smollm2.inference.harness import run_tasks
    from smollm2.inference.loading import load_source
    from smollm2.inference.scoring import Scorer

    device = choose_device(args)
    model, tokenizer, _ = load_source(Path(name), best=args.best, report=print_note)
    scorer = Scorer(model.to(device), tokenizer, choose_context(model, args.context), args.batch_size)
    metrics = run_tasks(loaded, scorer, limit=args.limit, num_fewshot=args.num_fewshot, report=print_note)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = choose_sizes(parameters)
    rows = [{**dataclasses.asdict(metric), "published": find_published(metric, sizes)} for metric in metrics]
    return {"model": name, "parameters": parameters, "context": scorer.context, "limit": args.limit, "tasks": rows}


def choose_sizes(parameters: int) -> list[str]:
    """Return the size of SmolLM2 that a model has, within 5 %, or else all sizes."""
    near = [name for name, size in SIZES.items() if abs(parameters - size) <= 0.05 * size]
    return near or list(SIZES)


def find_published(metric: "Metric", sizes: Sequence[str]) -> dict[str, float]:
    """Return the published figures that a metric can be compared with, by size; none for another number of examples."""
    found = PUBLISHED.get(metric.task)
    if found is None or (found.metric, found.shots) != (metric.metric, metric.shots):
        return {}
    figures = zip(SIZES, found.figures, strict=True)
    return {size: figure for size, figure in figures if size in sizes and figure is not None}


def describe_tasks(rows: Sequence[dict[str, Any]], sizes: Sequence[str]) -> Iterator[str]:
    """Yield the lines of one model's table."""
    shown = sizes if any(row["published"] for row in rows) else []
    head = ["task", "metric", "value", "95 %", "n", "shots", *(f"SmolLM2-{size}" for size in shown)]
    table = [head]
    for row in rows:
        bounds = "{:.4f} to {:.4f}".format(*row["interval"]) if row["interval"] else "-"
        figures = [f"{row['published'][size]:.3f}" if size in row["published"] else "-" for size in shown]
        numbers = [f"{row['value']:.4f}", bounds, f"{row['documents']:,}", str(row["shots"])]
        table.append([row["task"], row["metric"], *numbers, *figures])
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    if shown:
        yield describe_protocol([row["task"] for row in rows if row["published"]])


def describe_protocol(tasks: Sequence[str]) -> str:
    """Return the line that says how the published figures of these tasks were measured."""
    same = [task for task in tasks if not PUBLISHED[task].difference]
    parts = [f"same normalisation: {', '.join(same)}"] if same else []
    for text in dict.fromkeys(PUBLISHED[task].difference for task in tasks if task not in same):
        parts.append(f"{', '.join(task for task in tasks if PUBLISHED[task].difference == text)}: {text}")
    how = "SmolLM2's figures are from lighteval: zero-shot (gsm8k: 5 shots), choices by log-probability per character"
    return "; ".join([how, *parts])
