"""`smollm2 replay`: a step with a spike again, compared bit by bit."""

import argparse
from pathlib import Path

from smollm2.cli.flags import Commands, Parser, add_command, path
from smollm2.errors import TrainingError


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 replay`."""
    text = (
        "Run the batch of a spike again on the weights before it, and compare loss and gradient norm with those that "
        "the run recorded. The exit code is 0 if they are the same bits, else 5."
    )
    parser = add_command(commands, "replay", run, "a step with a spike again, from its folder in events/", text)
    parser.add_argument("event", type=path, metavar="FOLDER", help="such as checkpoints/events/step_0500")


def run(args: argparse.Namespace) -> None:
    """Replay the event and print both pairs of numbers. Raise TrainingError if they differ."""
    from smollm2.training.replay import replay_event

    found = replay_event(Path(args.event))
    for name, numbers in (("recorded", found.recorded), ("replayed", found.replayed)):
        print(f"step {found.step} {name}: loss {numbers.loss:.10g}, gradient norm {numbers.grad_norm:.10g}")
    if found.is_exact:
        print(
            "bit-exact"
            if found.expected is found.recorded
            else "bit-exact with the rerun in training: the recorded numbers came from a transient fault"
        )
        return
    loss, norm = (
        abs(new - old)
        for old, new in (
            (found.expected.loss, found.replayed.loss),
            (found.expected.grad_norm, found.replayed.grad_norm),
        )
    )
    differing = f"what differs: {', '.join(found.changed)}" if found.changed else "nothing that is known differs"
    raise TrainingError(
        args.event,
        f"the replay differs: loss by {loss:.2g}, gradient norm by {norm:.2g}; {differing}",
        "replay it on the machine, with the threads and the torch of the run",
    )
