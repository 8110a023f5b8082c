"""`smollm2 train`, which is also `python train.py`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from smollm2.cli.environment import check_launch
from smollm2.cli.flags import Commands, Parser, add_command
from smollm2.cli.run_flags import add_run_flags, load_run_config
from smollm2.errors import Interrupted

LAUNCHER = "SMOLLM2_LAUNCHER"
"""The environment variable in which run_training.sh passes the command that started it."""


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 train`."""
    text = "Train a model. Values come from the defaults, then the config file or preset, then the flags."
    add_run_flags(add_command(commands, "train", run, "train a model on your text", text))


def run(args: argparse.Namespace) -> None:
    """Train, and name the command that resumes the run if it is interrupted."""
    config, origins = load_run_config(args, args.unknown)
    check_launch(os.environ)
    if os.environ.get("RANK", "0") == "0":
        for warning in config.warnings():
            print(warning, flush=True)
    from smollm2.runtime.ranks import close_ranks
    from smollm2.training.loop import train

    try:
        train(config, resume=args.resume or "", checkpoint_path=args.checkpoint_path, origins=origins)
    except Interrupted as error:
        close_ranks()
        command = resume_command(sys.argv, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        stopped = Interrupted(f"{error}. Resume with: {command}", error.signal_number)
        stopped.rank = error.rank
        raise stopped from None
    close_ranks()


def resume_command(argv: Sequence[str], processes: int = 1) -> str:
    """Return the command that resumes this run with `processes` processes on this machine."""
    words, skip = [], False
    for word in argv[1:]:
        if skip:
            skip = False
        elif word in ("--checkpoint_path", "--resume"):
            skip = True
        elif not word.startswith(("--checkpoint_path=", "--resume=")):
            words.append(word)
    if launcher := os.environ.get(LAUNCHER):  # it resumes automatically
        return f"{launcher} {shlex.join(words)}".rstrip()
    is_command = Path(argv[0]).name in ("smollm2", "__main__.py")
    program = ["smollm2"] if is_command else ["python", argv[0]]
    if processes > 1:
        program = ["torchrun", "--nproc_per_node", str(processes), *(["-m", "smollm2"] if is_command else [argv[0]])]
    return shlex.join([*program, *words, "--resume", "auto"])
