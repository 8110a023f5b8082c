"""`smollm2 doctor`: check that a run is right, before hours are spent on it."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from smollm2.cli.flags import Commands, Parser, add_command
from smollm2.cli.run_flags import add_run_flags, load_run_config
from smollm2.errors import TrainingError


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 doctor`."""
    text = (
        "Check model, loss, step, data and machine of a run, with the flags of train, and train nothing. Exit code 5 if a "
        "check fails. docs/doctor.md says what each check proves and what it cannot see."
    )
    parser = add_command(commands, "doctor", run, "check that a run is right before it trains", text)
    parser.add_argument(
        "--short", action="store_true", help="make only the checks that train makes before its first step"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--strict", action="store_true", help="exit code 5 for warnings too")
    add_run_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Make the checks, print the table or the JSON, and write doctor.json to the run folder."""
    config, origins = load_run_config(args, args.unknown)
    from smollm2.analysis.checks import GROUPS, as_json, describe_counts, list_rows, worst_of
    from smollm2.runtime.device import environment, start_runtime
    from smollm2.tracking.console import ConsoleTracker, RunLog, find_secrets
    from smollm2.training.loop import claim_folder, prepare
    from smollm2.training.preflight import check_run, refuse_failures, write_results
    from smollm2.training.setup import Setup

    runtime = start_runtime(config.training)
    folder = Path(config.training.save_dir)
    log = RunLog(folder, runtime.rank, find_secrets(environment()))
    stream = sys.stderr if args.json else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.stop.listening())
        console = ConsoleTracker(config.training.train_steps, 0, stream, log)
        setup = Setup(config, origins, runtime, console)
        claim_folder(setup, stack)
        checked = prepare(setup, args.resume or "auto", args.checkpoint_path).run
        results = check_run(checked, deep=not args.short, show=lambda part: console.show_progress("checking", part))
        console.show_progress("checking", 1.0)
        content = as_json(results, deep=not args.short, step=checked.resumed_step)
        write_results(checked, content)
        if runtime.rank == 0 and args.json:
            print(json.dumps(content, indent=1))
        elif runtime.rank == 0:
            for group in GROUPS:
                console.show_page(group.capitalize(), list(list_rows([r for r in results if r.group == group])))
            print(f"{describe_counts(results)}; also in {folder / 'doctor.json'}")
        with runtime.together():
            refuse_failures(results)
            if args.strict and (warned := worst_of(results, "warn")):
                names = ", ".join(one.name for one in warned)
                raise TrainingError("--strict", f"{len(warned)} checks warn: {names}", "the table says what to do")
