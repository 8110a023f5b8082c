"""`smollm2 import`: a model of the Llama family, checked and written as a folder to train from."""

import argparse
from pathlib import Path

from smollm2.cli.export import show_certificate
from smollm2.cli.flags import Commands, Parser, add_command, path, print_note
from smollm2.config.initial_model import find_model_folder


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 import`."""
    text = (
        "Copy a model of the Llama family from a folder or the Hugging Face hub. What cannot be computed here is refused by "
        "name. The copy appears only after it was loaded again and gave the source's logits, loss, greedy text and token ids; "
        "weights, tokenizer and chat template stay byte for byte. Train it with `smollm2 train --init_from OUT`."
    )
    parser = add_command(commands, "import", run, "a model of the Llama family to start from", text)
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, or a name on the Hugging Face hub")
    parser.add_argument("folder", metavar="OUT", type=path, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier export of that name")


def run(args: argparse.Namespace) -> None:
    """Write the folder, and print how each reader's result compares with the source."""
    folder = find_model_folder(args.model, print_note)
    from smollm2.exporting.export import export

    certificate = export(folder, args.folder, force=args.force, report=print_note)
    show_certificate(certificate, Path(args.folder))
