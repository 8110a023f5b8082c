"""`smollm2 plan`: estimate the parameters, memory, disk space and time of a run."""

import argparse
import os

from smollm2.cli.flags import Commands, Parser, add_command
from smollm2.cli.run_flags import add_run_flags, load_run_config


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 plan`."""
    text = "Estimate what a run will take. Takes the flags of train."
    add_run_flags(add_command(commands, "plan", run, "what a run will take: parameters, memory, disk, time", text))


def run(args: argparse.Namespace) -> None:
    """Print the table of estimates."""
    config, _ = load_run_config(args, args.unknown)
    from smollm2.plan.describe import describe_plan
    from smollm2.plan.machine import find_machine

    rows = describe_plan(config, find_machine(os.environ))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    for warning in config.warnings():
        print(warning)
