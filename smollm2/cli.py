"""The command `smollm2`: parses flags, reads the config, and only then imports what costs seconds.

Every failure that a user can mend ends here as one line on standard error and an exit code (errors.py).
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from smollm2.config_file import add_config_flags, load_config_with_origins, read_config_flags, suggest_key
from smollm2.errors import ConfigError, Interrupted, Smollm2Error


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="smollm2", description="Train SmolLM2-class language models from text.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    train = commands.add_parser(
        "train",
        help="train a model from a text file",
        description="Train a model. Values come from the defaults, then the config file or preset, then the flags.",
        allow_abbrev=False,
    )
    add_run_flags(train)
    train.set_defaults(run=run_training)
    return parser


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
    if args.resume and args.checkpoint_path:
        raise ConfigError("--resume auto and --checkpoint_path name two places to go on from; give one of them")
    config, origins = load_config_with_origins(args.config, preset=args.preset, flags=read_flags(args))
    refuse_a_lost_launch()
    from smollm2.training import train

    try:
        train(config, resume=args.resume or "", checkpoint_path=args.checkpoint_path, origins=origins)
    except Interrupted as error:
        raise Interrupted(f"{error}. Go on with: {resume_command(sys.argv)}", error.signal_number) from None


def refuse_a_lost_launch() -> None:
    """`accelerate launch --num_processes 2` without --multi_gpu on a CPU runs one process and says nothing."""
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if launched and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch started one process where more were asked for; use: "
            "accelerate launch --multi_gpu --num_processes 2 train.py ... (it needs no GPU), or torchrun --nproc_per_node 2 train.py ..."
        )


def resume_command(argv: Sequence[str]) -> str:
    """The command that goes on where this one stopped."""
    words, skip = [], False
    for word in argv[1:]:
        if skip:
            skip = False
        elif word in ("--checkpoint_path", "--resume"):
            skip = True
        elif not word.startswith(("--checkpoint_path=", "--resume=")):
            words.append(word)
    program = ["smollm2"] if Path(argv[0]).name in ("smollm2", "__main__.py") else ["python", argv[0]]
    return shlex.join([*program, *words, "--resume", "auto"])


def main(argv: Sequence[str] | None = None) -> int:
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
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Smollm2Error as error:
        print(f"error: {error}" if "\n" not in str(error) else error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def describe_unknown(word: str) -> str:
    """A sentence for a flag that does not exist, with the key that was meant."""
    flag = word.split("=")[0]
    return f"{flag}: unknown; {suggest_key(flag.lstrip('-'))}"
