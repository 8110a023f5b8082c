"""`smollm2 export`: write a folder that transformers, vLLM, llama.cpp, Ollama and other programs can load."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smollm2.cli.flags import Commands, Parser, add_command, add_model_flags, number, path, print_note


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 export`."""
    text = (
        "Write a folder that transformers, vLLM and others load, or a GGUF file for llama.cpp and Ollama. It appears only after "
        "it was loaded again from the disk and gave the checkpoint's logits, loss, greedy text and token ids."
    )
    parser = add_command(
        commands, "export", run, "a Hugging Face folder or a GGUF file, compared with the checkpoint", text
    )
    add_model_flags(parser)
    parser.add_argument("folder", metavar="OUT", type=path, help="the folder to write")
    text = "huggingface (default), or gguf for llama.cpp and Ollama"
    parser.add_argument("--format", choices=["huggingface", "gguf"], default="huggingface", help=text)
    choices = ["float32", "bf16", "fp16", "bfloat16", "float16", "q8_0"]
    text = "of the weights; q8_0 is for gguf; default: that of a Hugging Face folder, float32 for a checkpoint"
    parser.add_argument("--dtype", choices=choices, default="", help=text)
    text = "largest weights file of huggingface, in GB; default: 5"
    parser.add_argument("--shard_gb", type=number(1e-6, 1e6), default=5.0, metavar="N", help=text)
    text = "text of the comparison; default: Python's own documentation"
    parser.add_argument("--input_file", metavar="FILE", type=path, help=text)
    parser.add_argument("--force", action="store_true", help="replace an earlier export of that name")


def run(args: argparse.Namespace) -> None:
    """Write the folder and print how each reader's result compares with the source."""
    from smollm2.exporting.export import export

    certificate = export(
        args.model,
        args.folder,
        args.format,
        dtype=args.dtype,
        best=args.best,
        force=args.force,
        shard_bytes=int(args.shard_gb * 1e9),
        text_file=args.input_file,
        report=print_note,
    )
    show_certificate(certificate, args.folder)


def show_certificate(certificate: Mapping[str, Any], folder: Path) -> None:
    """Print how each reader's result compares with the source."""
    if file := certificate.get("file"):
        print(f"{file['reader']}: {file['keys']} keys, {file['tensors']} tensors, {file['tokens']:,} tokens equal")
    for reading in certificate["readers"]:
        print(
            f"{reading['reader']}: logits differ by at most {reading['max_logit_difference']:.2g}, greedy text equal over "
            f"{reading['greedy_equal']} tokens, {reading['texts_equal']} of {reading['texts']} hostile texts equal"
        )
    for reader in certificate["unusable_readers"]:
        print(f"{reader['reader']}: not used to check the folder ({reader['reason']})")
    print(f"{folder}: the same model, in {certificate['dtype']}; parity.json and README.md hold the proof")
