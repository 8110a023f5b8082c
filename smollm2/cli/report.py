"""`smollm2 report`: a page about a run, or a comparison of several."""

import argparse
import shutil
import sys
from pathlib import Path

from smollm2.cli.flags import Commands, Parser, add_command, file_path, path, print_note
from smollm2.errors import ConfigError
from smollm2.storage.run_folder import REPORT


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 report`."""
    text = (
        "Write one HTML file that opens from the disk: verdict, curves, samples, events, configuration. It is made from the "
        "run folder alone. A run also writes its own while it trains."
    )
    parser = add_command(commands, "report", run, "a page about a run, or about several side by side", text)
    text = "a run folder: the --save_dir of a training"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path, help=text)
    text = "default: report.html in the run folder; comparison.html here for several runs"
    parser.add_argument("--output", metavar="FILE", type=file_path, help=text)
    parser.add_argument("--terminal", action="store_true", help="draw the curves in this terminal instead")


def run(args: argparse.Namespace) -> None:
    """Write the page, or draw the curves."""
    if args.terminal and args.output:
        raise ConfigError("--terminal", "cannot be combined with --output", "use one of the two")
    from smollm2.report.reading import read_runs

    runs = read_runs([Path(run) for run in args.runs])
    if args.terminal:
        from smollm2.report.terminal import draw_run

        width = shutil.get_terminal_size().columns
        print("\n\n".join("\n".join(draw_run(run, width, sys.stdout.encoding)) for run in runs))
        return
    from smollm2.report.page import write_page

    output = Path(args.output or (runs[0].path / REPORT if len(runs) == 1 else "comparison.html"))
    write_page(runs, output)
    for run in runs:
        for problem in run.problems:
            print_note(f"{run.path}: {problem}")
    print(f"{output}: open it in a browser")
