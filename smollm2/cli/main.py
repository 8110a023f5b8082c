"""The command `smollm2`: parses flags, reads the config, and only then imports what costs seconds.

Every failure that a user can mend ends here as one line on standard error and an exit code (errors.py).
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smollm2.config.reading import add_config_flags, load_config_with_origins, read_config_flags
from smollm2.config.schema import Config
from smollm2.config.vocabulary import suggest_key
from smollm2.errors import EXIT_CODE_FILE, ConfigError, DataError, Interrupted, Smollm2Error

if TYPE_CHECKING:
    from smollm2.inference.evaluation import Comparison
    from smollm2.inference.generation import Piece

LAUNCHER = "SMOLLM2_LAUNCHER"
"""The variable in which run_training.sh leaves the command by which it was called."""

SHOWN_DOCUMENTS = 20
"""Rows of the table of `smollm2 evaluate --per_document`."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="smollm2", description="Train SmolLM2-class language models from text.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    text = "Train a model. Values come from the defaults, then the config file or preset, then the flags."
    add_run_flags(add_command(commands, "train", run_training, "train a model from a text file", text))
    text = "Say what a run will take, by arithmetic. Takes the flags of train."
    add_run_flags(
        add_command(commands, "plan", show_plan, "what a run will take: parameters, memory, disk, time", text)
    )
    add_evaluate(commands)
    add_export(commands)
    add_generate(commands)
    add_landscape(commands)
    add_report(commands)
    return parser


def add_command(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
) -> Parser:
    """`smollm2 NAME`, to which its flags are added."""
    parser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def add_model_flags(parser: argparse.ArgumentParser, exported: str = ", or a Hugging Face folder") -> None:
    """Which trained model a command is about."""
    parser.add_argument("model", metavar="MODEL", help=f"a .pt file, a run folder (its newest checkpoint){exported}")
    parser.add_argument("--best", action="store_true", help="of a run folder, the checkpoint with the best validation")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Where a command computes."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")


def add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    """`smollm2 evaluate`."""
    text = "Score each token of a text once, in windows of the trained length, and print the loss. Several models are compared."
    parser = add_command(
        commands, "evaluate", run_evaluation, "loss, perplexity and bits per byte of models on a text", text
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a .pt file, a run folder (its newest checkpoint) or a Hugging Face folder; several are compared with the first",
    )
    parser.add_argument("--best", action="store_true", help="of a run folder, the checkpoint with the best validation")
    add_device_flag(parser)
    parser.add_argument("--input_file", metavar="FILE", required=True, help="text file, UTF-8; - is standard input")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a window; default: as many as the model was trained on"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between two windows; default: half the context")
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="windows in one forward pass; default: 8"
    )
    parser.add_argument(
        "--document_separator",
        metavar="TEXT",
        help=r"text between two documents, \f and \n understood; default: as the checkpoint was trained",
    )
    parser.add_argument("--per_document", action="store_true", help="score each document alone, and list them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    """`smollm2 export`."""
    text = (
        "Write a folder that transformers, vLLM and others load. It appears only when, loaded again from the disk, it gave "
        "the checkpoint's logits, loss, greedy text and token ids."
    )
    parser = add_command(commands, "export", run_export, "a Hugging Face folder, proved to be the same model", text)
    add_model_flags(parser)
    parser.add_argument("folder", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bf16", "fp16"], default="float32", help="of the weights; default: float32"
    )
    parser.add_argument(
        "--shard_gb", type=float, default=5.0, metavar="N", help="largest weights file, in GB; default: 5"
    )
    parser.add_argument(
        "--input_file", metavar="FILE", help="text of the comparison; default: Python's own documentation"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export of that name")


def add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    """`smollm2 generate`."""
    text = "Continue a prompt; without one, start a new document. Results go to standard output, remarks to standard error."
    parser = add_command(commands, "generate", run_generation, "text from a checkpoint or an exported folder", text)
    add_model_flags(parser)
    add_device_flag(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument(
        "--prompts_file",
        metavar="FILE",
        help='JSON Lines, "text" or {"prompt": "text", ...}; - is standard input; writes JSON Lines',
    )
    source.add_argument("--interactive", action="store_true", help="ask for prompts until the end of input")
    parser.add_argument("--json", action="store_true", help="write JSON Lines")
    for name, kind, default, text in GENERATE_NUMBERS:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text}; default: {default}")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--precision", choices=["float32", "bf16", "fp16"], help="default: float32; bf16 on a GPU")


def add_landscape(commands: "argparse._SubParsersAction[Parser]") -> None:
    """`smollm2 landscape`."""
    text = (
        "Measure the loss along random directions from the weights, on windows of the run's own text, and draw it. "
        "A call that was stopped goes on where it stood."
    )
    parser = add_command(commands, "landscape", run_landscape, "the loss around the weights of a checkpoint", text)
    add_model_flags(parser, exported="")
    add_device_flag(parser)
    parser.add_argument(
        "--points", type=int, default=25, metavar="N", help="on a side of the plane, an odd number; default: 25"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the directions; default: the run's")
    parser.add_argument("--input_file", metavar="FILE", help="another text than the run's")
    parser.add_argument(
        "--output", metavar="FILE", help="default: landscape.json beside the checkpoint; the page ends with .html"
    )


def add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    """`smollm2 report`."""
    text = (
        "Write one HTML file that opens from the disk: verdict, curves, samples, events, configuration. It is built from the "
        "run folder alone. A run also writes its own while it goes on."
    )
    parser = add_command(commands, "report", run_report, "a page about a run, or about several side by side", text)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder: the --save_dir of a training")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run folder; comparison.html here for several runs"
    )
    parser.add_argument("--terminal", action="store_true", help="draw the curves in this terminal instead")


GENERATE_NUMBERS: list[tuple[str, type[int] | type[float], float, str]] = [
    ("max_new_tokens", int, 256, "tokens to write at most"),
    ("temperature", float, 0.8, "0 takes the likeliest token"),
    ("top_k", int, 50, "draw among the K likeliest tokens, 0: among all"),
    ("top_p", float, 1.0, "draw among the likeliest tokens that make up this probability"),
    ("min_p", float, 0.0, "leave out tokens below this share of the likeliest one's probability"),
    ("repetition_penalty", float, 1.0, "above 1: fewer repetitions"),
    ("samples", int, 1, "texts a prompt; the second has the next seed, and so on"),
    ("seed", int, 0, "the same model, prompt and seed give the same text"),
    ("batch_size", int, 8, "texts that are written together"),
]


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The user's own flags, then one for each key."""
    run = parser.add_argument_group("the run")
    run.add_argument("--config", metavar="FILE", help="config file; default: config.yaml")
    run.add_argument(
        "--preset",
        metavar="NAME",
        help="a config that comes along: nano, micro, smollm2-135m, smollm2-360m, smollm2-1.7b",
    )
    run.add_argument("--input_file", metavar="FILE", help="data.input: text file; - is standard input")
    run.add_argument("--save_dir", metavar="FOLDER", help="training.save_dir: the run folder")
    run.add_argument("--train_steps", metavar="N", help="training.train_steps: updates in the whole run")
    run.add_argument(
        "--resume", choices=["auto"], help="auto: go on from the newest valid checkpoint in save_dir, if there is one"
    )
    run.add_argument("--checkpoint_path", metavar="FILE", help="go on from this checkpoint")
    run.add_argument("--disable_wandb", action="store_true", help="wandb.enabled: false; nothing of W&B is imported")
    add_config_flags(parser)


def read_flags(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Dotted key -> (flag as typed, text), of all flags that name a key."""
    short = {"input_file": "data.input", "save_dir": "training.save_dir", "train_steps": "training.train_steps"}
    flags = {key: (f"--{name}", getattr(args, name)) for name, key in short.items() if getattr(args, name) is not None}
    if args.disable_wandb:
        flags["wandb.enabled"] = ("--disable_wandb", "false")
    twice = read_config_flags(args)
    for key in flags.keys() & twice.keys():
        raise ConfigError(f"{flags[key][0]} and {twice[key][0]} set the same key {key}; give one of them")
    return {**flags, **twice}


def run_training(args: argparse.Namespace) -> None:
    """`smollm2 train`."""
    config, origins = load_run_config(args)
    refuse_a_lost_launch()
    from smollm2.runtime.ranks import close_ranks
    from smollm2.training.loop import train

    try:
        train(config, resume=args.resume or "", checkpoint_path=args.checkpoint_path, origins=origins)
    except Interrupted as error:
        close_ranks()
        command = resume_command(sys.argv, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        stopped = Interrupted(f"{error}. Go on with: {command}", error.signal_number)
        stopped.rank = error.rank
        raise stopped from None
    close_ranks()


def load_run_config(args: argparse.Namespace) -> tuple[Config, dict[str, str]]:
    """The config that file and flags come to, and where each value is from."""
    if args.resume and args.checkpoint_path:
        raise ConfigError("--resume auto and --checkpoint_path name two places to go on from; give one of them")
    return load_config_with_origins(args.config, preset=args.preset, flags=read_flags(args))


def show_plan(args: argparse.Namespace) -> None:
    """`smollm2 plan`."""
    from smollm2.plan.describe import describe_plan
    from smollm2.plan.machine import find_machine

    config, _ = load_run_config(args)
    rows = describe_plan(config, find_machine(os.environ))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def run_evaluation(args: argparse.Namespace) -> None:
    """`smollm2 evaluate`."""
    check_range("--batch_size", args.batch_size, 1, 10**6)
    if args.document_separator == "":
        raise ConfigError("--document_separator is empty; give the text between two documents, or leave it out")
    from smollm2.inference.evaluation import compare_evaluations

    results = [evaluate_model(args, name) for name in args.models]
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


def evaluate_model(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the evaluation of one model, with documents read as it was trained."""
    from smollm2.config.schema import DataConfig
    from smollm2.inference.evaluation import evaluate
    from smollm2.inference.loading import load_source, read_config

    device = choose_device(args)
    model, tokenizer, state = load_source(Path(name), best=args.best, report=remark)
    data = read_config(state, Path(name)).data if state else DataConfig()
    separator = data.document_separator
    del state  # the optimizer's moments are two thirds of a checkpoint
    if args.document_separator:
        separator = args.document_separator.replace("\\f", "\f").replace("\\n", "\n").replace("\\t", "\t")
    return evaluate(
        model.to(device),
        tokenizer,
        Path(args.input_file),
        context=args.context,
        batch_size=args.batch_size,
        stride=args.stride,
        separator=separator,
        per_document=args.per_document,
        document_mask=data.document_mask,
        report=remark,
        keep_scores=len(args.models) > 1,
    )


def describe_comparison(first: str, second: str, comparison: "Comparison | None") -> str:
    """Return the line that compares two models."""
    if comparison is None:
        return f"{second}: not comparable window by window with {first}: use the same --context and --stride, or --per_document"
    if not comparison.difference:
        return f"{second} and {first} are equal in bits per byte, over {comparison.parts:,} parts"
    better = "better" if comparison.difference < 0 else "worse"
    sure = f", 95 %: {comparison.interval[0]:+.4f} to {comparison.interval[1]:+.4f}" if comparison.interval else ""
    chance = "" if comparison.is_significant else "; this may be chance"
    return f"{second} is {better} than {first} by {abs(comparison.difference):.4f} bits per byte ({comparison.difference:+.4f}{sure}){chance}"


def describe_evaluation(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of `smollm2 evaluate`."""
    for name, unit in (("loss", "nats per token"), ("perplexity", ""), ("bits_per_byte", "")):
        interval = found[f"{name}_interval"]
        sure = f"  95 %: {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        yield f"{name:<16}{found[name]:>12.4f}{sure}{f'  {unit}' if unit else ''}"
    kind = "documents" if "documents" in found else "windows"
    yield f"{'tokens':<16}{found['tokens']:>12,}  in {found['parts']:,} {kind}, context {found['context']:,}, stride {found['stride']:,}"
    yield f"{'bytes':<16}{found['bytes']:>12,}"
    if found["unencodable_bytes"]:
        yield f"{found['unencodable_bytes']:,} bytes of the text are beyond this tokenizer and were not scored"
    documents = found.get("documents", [])
    if documents:
        yield f"\n{'document':>8}{'loss':>12}{'perplexity':>14}{'bits_per_byte':>15}{'tokens':>12}"
    for number, row in enumerate(documents[:SHOWN_DOCUMENTS], 1):
        yield f"{number:>8}{row['loss']:>12.4f}{row['perplexity']:>14.4f}{row['bits_per_byte']:>15.4f}{row['tokens']:>12,}"
    if len(documents) > SHOWN_DOCUMENTS:
        yield f"and {len(documents) - SHOWN_DOCUMENTS:,} more; --json lists all"


def run_landscape(args: argparse.Namespace) -> None:
    """`smollm2 landscape`."""
    check_range("--points", args.points, 3, 401)
    if args.points % 2 == 0:
        raise ConfigError(f"--points - {args.points} has no point in the middle - give an odd number")
    if args.seed is not None:
        check_range("--seed", args.seed, 0, 2**63 - 1)
    if args.output is not None and not Path(args.output).name:
        raise ConfigError(f"--output - {args.output!r} is no name of a file - give one")
    from smollm2.analysis.landscape import draw_landscape, open_source
    from smollm2.tracking.console import ConsoleTracker

    device = choose_device(args)
    console = ConsoleTracker(0, 0, sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as spool:
            source = open_source(Path(args.model), args.input_file, Path(spool), device, remark, best=args.best)
            output = Path(args.output or source.path.parent / "landscape").with_suffix(".json")
            landscape = draw_landscape(
                source,
                output,
                side=args.points,
                seed=source.config.training.seed if args.seed is None else args.seed,
                report=console.report,
                show=lambda fraction: console.show_progress("landscape", fraction),
            )
    except KeyboardInterrupt:
        console.report("the points that were measured are kept; the same command goes on")
        raise
    finally:
        console.close()
    from smollm2.report.page import write_landscape_page

    write_landscape_page(landscape, source.state["step"], output.with_suffix(".html"))
    lowest = min(min(row) for row in landscape.grid)
    print(f"loss {landscape.loss:.4f} at the centre, {lowest:.4f} at the lowest point")
    print(f"{output} and {output.with_suffix('.html')}")


def run_export(args: argparse.Namespace) -> None:
    """`smollm2 export`."""
    if not 1e-6 <= args.shard_gb <= 1e6:
        raise ConfigError(f"--shard_gb {args.shard_gb:g} is not possible; use 0.000001 to 1000000")
    from smollm2.exporting.hugging_face import export

    certificate = export(
        args.model,
        args.folder,
        dtype=args.dtype,
        best=args.best,
        force=args.force,
        shard_bytes=int(args.shard_gb * 1e9),
        text_file=args.input_file,
        report=remark,
    )
    for reading in certificate["readers"]:
        print(
            f"{reading['reader']}: logits differ by at most {reading['max_logit_difference']:.2g}, greedy text equal over "
            f"{reading['greedy_equal']} tokens, {reading['texts_equal']} of {reading['texts']} hostile texts equal"
        )
    for reader in certificate["unusable_readers"]:
        print(f"{reader['reader']}: not used to check the folder ({reader['reason']})")
    print(f"{args.folder}: the same model, in {certificate['dtype']}; parity.json and README.md hold the proof")


def run_report(args: argparse.Namespace) -> None:
    """`smollm2 report`."""
    if args.terminal and args.output:
        raise ConfigError("--terminal and --output are two places for the report; give one of them")
    from smollm2.report.reading import read_runs

    runs = read_runs([Path(run) for run in args.runs])
    if args.terminal:
        from smollm2.report.terminal import draw_run

        width = shutil.get_terminal_size().columns
        print("\n\n".join("\n".join(draw_run(run, width, sys.stdout.encoding)) for run in runs))
        return
    from smollm2.report.page import write_page

    output = Path(args.output or (runs[0].path / "report.html" if len(runs) == 1 else "comparison.html"))
    write_page(runs, output)
    for run in runs:
        for problem in run.problems:
            remark(f"{run.path}: {problem}")
    print(f"{output}: open it in a browser")


def run_generation(args: argparse.Namespace) -> None:
    """`smollm2 generate`."""
    for name, low, high in (("max_new_tokens", 1, 10**9), ("samples", 1, 10**6), ("batch_size", 1, 10**6)):
        check_range(f"--{name}", getattr(args, name), low, high)
    check_range("--seed", args.seed, 0, 2**63 - args.samples)
    rows = read_prompts(args.prompts_file) if args.prompts_file else [{"prompt": args.prompt or ""}]
    write = prepare_generation(args)
    if args.interactive:
        continue_prompts(args, write)
    elif args.prompts_file or args.json:
        write_json_lines(args, rows, write)
    else:
        write_texts(args, rows[0]["prompt"], write)


Write = Callable[[Sequence[str], Sequence[int]], "Iterator[Piece]"]
"""Prompts and their seeds -> pieces of text."""


def prepare_generation(args: argparse.Namespace) -> Write:
    """Load the model; what it writes with these settings."""
    import torch

    from smollm2.inference.generation import stream
    from smollm2.inference.loading import load_source
    from smollm2.inference.sampling import Sampling
    from smollm2.runtime.precision import choose_precision, device_features

    sampling = Sampling(
        args.temperature, args.top_k or None, args.top_p, args.min_p, args.repetition_penalty
    )  # before the model is loaded: a wrong value is said at once
    device = choose_device(args)
    requested = args.precision or ("float32" if device == "cpu" else "auto")
    features = device_features(torch.device(device))
    precision = choose_precision(requested, device, features, "--precision", "leave it out")
    model, tokenizer, _ = load_source(Path(args.model), best=args.best, report=remark)
    model.to(device, precision.dtype)

    def write(prompts: Sequence[str], seeds: Sequence[int]) -> "Iterator[Piece]":
        return stream(
            model,
            tokenizer,
            prompts,
            seeds,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            stop=args.stop,
            report=remark,
        )

    return write


def choose_device(args: argparse.Namespace) -> str:
    """The device of --device. Raises ConfigError where it is not here."""
    import torch

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise ConfigError("--device - torch finds no cuda GPU here - leave it out, or give cpu")
    return args.device or ("cuda" if has_gpu else "cpu")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises ConfigError."""
    if not low <= value <= high:
        raise ConfigError(f"{name} - {value} will not do - give {low} to {high}")


def remark(message: str) -> None:
    """A line beside the results."""
    print(message, file=sys.stderr, flush=True)


def read_prompts(name: str) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, each with its `prompt`. Raises DataError naming the line."""
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{name} - it cannot be read: {error.strerror} - name a JSON Lines file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} - byte {error.start} is not UTF-8 - convert it to UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{name}:{number} - it is no prompt - write "text" or {{"prompt": "text"}} on each line')
        rows.append(row)
    return rows


def write_json_lines(args: argparse.Namespace, rows: Sequence[dict[str, Any]], write: Write) -> None:
    """One object for each prompt and sample, in order: the row, with its `text`, why it ended, and its `seed`."""
    tasks = [{**row, "seed": args.seed + sample} for row in rows for sample in range(args.samples)]
    for start in range(0, len(tasks), args.batch_size):
        batch = [{**task, "text": "", "end": ""} for task in tasks[start : start + args.batch_size]]
        for piece in write([task["prompt"] for task in batch], [task["seed"] for task in batch]):
            batch[piece.index]["text"] += piece.text
            batch[piece.index]["end"] = piece.end
        for done in batch:
            print(json.dumps(done), flush=True)


def write_texts(args: argparse.Namespace, prompt: str, write: Write) -> None:
    """The prompt and what follows it, as it is written; several samples one after the other."""
    for sample in range(args.samples):
        if args.samples > 1:
            remark(f"sample {sample + 1}, seed {args.seed + sample}:")
        show(prompt)
        for piece in write([prompt], [args.seed + sample]):
            show(piece.text)
        show("\n")


def continue_prompts(args: argparse.Namespace, write: Write) -> None:
    """The prompt loop; each turn has the next seeds. Ctrl-C ends a text, Ctrl-D the loop."""
    remark("a prompt and Enter; Ctrl-C ends a text, Ctrl-D the program")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise DataError("standard input - a prompt is not UTF-8 - convert it to UTF-8") from None
        try:
            write_texts(args, prompt, write)
        except KeyboardInterrupt:
            show("\n")
        args.seed = (args.seed + args.samples) % 2**62


def show(text: str) -> None:
    """Text of a model or a prompt: escaped on a terminal, which would obey it; into a file or a pipe as it is."""
    from smollm2.tracking.base import escape_controls

    print(escape_controls(text) if sys.stdout.isatty() else text, end="", flush=True)


def refuse_a_lost_launch() -> None:
    """`accelerate launch --num_processes 2` without --multi_gpu on a CPU runs one process and says nothing."""
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if launched and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch started one process where more were asked for; use: "
            "accelerate launch --multi_gpu --num_processes 2 train.py ... (it needs no GPU), or torchrun --nproc_per_node 2 train.py ..."
        )


def resume_command(argv: Sequence[str], processes: int = 1) -> str:
    """The command that goes on where this one stopped, with as many processes on this machine."""
    words, skip = [], False
    for word in argv[1:]:
        if skip:
            skip = False
        elif word in ("--checkpoint_path", "--resume"):
            skip = True
        elif not word.startswith(("--checkpoint_path=", "--resume=")):
            words.append(word)
    if launcher := os.environ.get(LAUNCHER):  # it resumes by itself
        return f"{launcher} {shlex.join(words)}".rstrip()
    is_command = Path(argv[0]).name in ("smollm2", "__main__.py")
    program = ["smollm2"] if is_command else ["python", argv[0]]
    if processes > 1:
        program = ["torchrun", "--nproc_per_node", str(processes), *(["-m", "smollm2"] if is_command else [argv[0]])]
    return shlex.join([*program, *words, "--resume", "auto"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Under run_training.sh's launcher rank 0 leaves it in a file, and all ranks
    return 0: torchrun would return 1 for any other, after 30 lines of its own about it."""
    code = run_command(argv)
    path = os.environ.get(EXIT_CODE_FILE)
    if not path:
        return code
    if os.environ.get("RANK", "0") == "0":
        Path(path).write_text(str(code), encoding="ascii")
    return 0


def check_config(argv: Sequence[str]) -> int:
    """0 where `train` would accept these arguments, else the exit code, and it is said: before several processes start."""
    try:
        args, unknown = build_parser().parse_known_args(["train", *argv])
        if unknown:
            raise ConfigError(describe_unknown(unknown[0]))
        load_run_config(args)
    except Smollm2Error as error:
        say_error(error, 0, 0)
        return error.exit_code
    return 0


def say_error(error: Smollm2Error, rank: int, local_rank: int) -> None:
    """By the one process that it names; what is wrong with the config, which ranks read before they meet, once a machine."""
    if rank == error.rank or (isinstance(error, ConfigError) and local_rank == 0):
        where = "" if isinstance(error, Interrupted) else f"error: rank {rank}: " if rank else "error: "
        print(error if "\n" in str(error) else f"{where}{error}", file=sys.stderr)


def run_command(argv: Sequence[str] | None) -> int:
    """Run one command; returns the exit code."""
    try:
        parser = build_parser()
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ConfigError(describe_unknown(unknown[0]))
        if args.command is None:
            parser.print_help()
            return 2
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `smollm2 ... | head`; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Smollm2Error as error:
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        say_error(error, rank, local_rank)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def describe_unknown(word: str) -> str:
    """A sentence for a flag that does not exist, with the key that was meant."""
    flag = word.split("=")[0]
    return f"{flag}: unknown; {suggest_key(flag.lstrip('-'))}"
