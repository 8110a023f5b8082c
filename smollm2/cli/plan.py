"""`smollm2 plan`: estimate the parameters, memory, disk space and time of a run."""

import argparse
import os

from smollm2.cli.flags import Commands, Parser, add_command, whole_number
from smollm2.cli.run_flags import add_run_flags, load_run_config


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 plan`."""
    text = "Estimate what a run will take. Takes the flags of train."
    parser = add_command(commands, "plan", run, "what a run will take: parameters, memory, disk, time", text)
    add_run_flags(parser)
    cluster = parser.add_argument_group("several devices")
    cluster.add_argument(
        "--devices",
        metavar="N",
        type=whole_number(1, 1024),
        help="plan for N devices (GPUs, or CPU processes) in each machine; default: the GPUs of this machine, or 1",
    )
    cluster.add_argument(
        "--machines", metavar="M", type=whole_number(1, 65_536), help="plan for M such machines; default: 1"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table of estimates."""
    config, _ = load_run_config(args, args.unknown)
    from smollm2.plan.describe import describe_plan
    from smollm2.plan.machine import find_machine

    machine = find_machine(os.environ)
    rows = describe_plan(config, machine)
    if args.devices or args.machines:
        from smollm2.plan.describe_cluster import describe_cluster, find_memory
        from smollm2.plan.scale import Cluster

        cluster = Cluster(args.machines or 1, args.devices or max(1, machine.gpus))
        rows += describe_cluster(config, machine, cluster, find_memory(machine, cluster))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    for warning in config.warnings():
        print(warning)
