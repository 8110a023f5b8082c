"""`smollm2 convert`: a checkpoint from a file to a folder, or back."""

import argparse
from pathlib import Path

from smollm2.cli.flags import Commands, Parser, add_command, path


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 convert`."""
    text = (
        "Write a checkpoint that is a folder (step_0500) as one file (step_0500.pt), or a file as a folder. Every other command "
        "reads both. The result is read again and compared with its source."
    )
    parser = add_command(commands, "convert", run, "a checkpoint from a folder to one file, or back", text)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path, help="step_XXXX.pt or step_XXXX")
    parser.add_argument("target", metavar="OUT", type=path, help="step_XXXX or step_XXXX.pt, in any folder")


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint, and say so."""
    from smollm2.checkpoint.converting import convert

    convert(Path(args.checkpoint), Path(args.target))
    print(f"{args.target}: the same checkpoint, read again and compared")
