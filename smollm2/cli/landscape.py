"""`smollm2 landscape`: the loss around the weights of a checkpoint."""

import argparse
import sys
import tempfile
from pathlib import Path

from smollm2.cli.flags import (
    Commands,
    Parser,
    add_command,
    add_device_flag,
    add_model_flags,
    choose_device,
    file_path,
    path,
    print_note,
    whole_number,
)


def odd_number(text: str) -> int:
    """Return the number of points per side; it must be odd, so that one is in the middle."""
    value = whole_number(3, 401)(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f"must be odd (got {text})")
    return value


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 landscape`."""
    text = (
        "Measure the loss along random directions from the weights, on windows of the run's own text, and draw it. "
        "An interrupted call is resumed by the same command."
    )
    parser = add_command(commands, "landscape", run, "the loss around the weights of a checkpoint", text)
    add_model_flags(parser, exported="")
    add_device_flag(parser)
    text = "on a side of the plane, an odd number; default: 25"
    parser.add_argument("--points", type=odd_number, default=25, metavar="N", help=text)
    text = "of the directions; default: the run's"
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), metavar="N", help=text)
    parser.add_argument("--input_file", metavar="FILE", type=path, help="a text other than the run's")
    text = "default: landscape.json beside the checkpoint; the page is named the same, with .html"
    parser.add_argument("--output", metavar="FILE", type=file_path, help=text)


def run(args: argparse.Namespace) -> None:
    """Measure the landscape, write it and print the paths of its files."""
    from smollm2.analysis.landscape import draw_landscape, open_source
    from smollm2.tracking.console import ConsoleTracker

    device = choose_device(args)
    console = ConsoleTracker(0, 0, sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as spool:
            source = open_source(Path(args.model), args.input_file, Path(spool), device, print_note, best=args.best)
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
        console.report("the measured points are kept; the same command resumes")
        raise
    finally:
        console.close()
    from smollm2.report.page import write_landscape_page

    write_landscape_page(landscape, source.state["step"], output.with_suffix(".html"))
    lowest = min(min(row) for row in landscape.grid)
    print(f"loss {landscape.loss:.4f} at the centre, {lowest:.4f} at the lowest point")
    print(f"{output} and {output.with_suffix('.html')}")
