"""Tiny runs that are stopped or killed, each in a fork of one warm process that itself never computes.

    PYTHONPATH=.:tests python tests/fork_trials.py kills FOLDER --kills 20 --seed 1

prints one JSON object a trial; tests/test_faults.py reads them. A stage is a function of the run that is wrapped in the
child: at its call number `call` the signal goes out. The product knows nothing of it.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it: the forks then need not
from runs import TINY, WORDS, outcome, write_tiny

from smollm2.checkpoint import saving
from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.cli import main as cli
from smollm2.data import corpus
from smollm2.runtime.device import Runtime
from smollm2.tracking.base import Fanout
from smollm2.training import actions, loop, setup

STEPS = 12
CONFIG = (
    TINY.replace("save_interval: 4", "save_interval: 3, keep_last: 2")
    .replace("{tokenizer: bytes", "{tokenizer: auto")
    .replace("{hidden_size", "{vocab_size: 300, hidden_size")
)


@dataclass(frozen=True)
class Stage:
    """Where a signal falls: in call number `call` of `name` of `owner`; `signals` of them."""

    title: str
    owner: object
    name: str
    call: int = 1
    signals: int = 1
    flags: tuple[str, ...] = ()


STAGES = [
    Stage("reading the text", corpus, "open_input"),
    Stage("training the tokenizer", corpus, "train_tokenizer"),
    Stage("tokenizing", corpus, "prepare_tokens"),
    Stage("building the model", setup, "build_model"),
    Stage("the first step", loop, "train_step"),
    Stage("a later step", loop, "train_step", 7),
    Stage("a report", loop, "describe_step", 4),
    Stage("an evaluation", actions, "validate"),
    Stage("the second batch of an evaluation", Runtime, "raise_if_stopped", 2),
    Stage("sampling", actions, "generate", 2),
    Stage("a save", saving, "save_checkpoint", 2),
    Stage("pruning", saving, "prune_checkpoints", 3),
    Stage("the last evaluation", actions, "validate", 3),
    Stage("the last samples", actions, "generate", 3),
    Stage("the last save", saving, "save_checkpoint", 4),
    Stage("closing the trackers", Fanout, "close"),
    Stage("a save, twice", saving, "save_checkpoint", 2, signals=2),
    Stage("an evaluation, twice", actions, "validate", 2, signals=2),
]


def in_a_fork(folder: Path, *flags: str, before: Callable[[], None] = lambda: None) -> int:
    """The pid of a child that runs `smollm2 train` in `folder`, its output in out.txt, after `before`."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        with Path("out.txt").open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            before()
            sys.argv = ["smollm2", "train", *flags]
            code = cli.main(sys.argv[1:])
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """Its exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupting(stage: Stage, number: int) -> Callable[[], None]:
    """Wraps the stage's function, in the child, so that the signals go out as it begins."""

    def wrap() -> None:
        original, calls = getattr(stage.owner, stage.name), 0

        def watched(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stage.call:
                for _ in range(stage.signals):
                    os.kill(os.getpid(), number)
                    time.sleep(0.02)  # the stage may be on another thread: this one must have taken it before the next
            return original(*arguments, **named)

        setattr(stage.owner, stage.name, watched)

    return wrap


def make_whole(folder: Path) -> tuple[str, list[dict[str, object]]]:
    """The outcome of the run that nobody disturbed."""
    write_tiny(folder, config=CONFIG, text=WORDS * 60)
    code = finish(in_a_fork(folder))
    assert code == 0, (folder / "out.txt").read_text()
    return outcome(folder / "checkpoints", STEPS)


def try_signals(folder: Path, titles: list[str]) -> None:
    """Each stage once, the three signals in turn: its exit code, its last line, and whether the bits are the same."""
    expected = make_whole(folder / "whole")
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    for index, stage in enumerate(s for s in STAGES if not titles or s.title in titles):
        place, number = folder / str(index), numbers[index % 3]
        write_tiny(place, config=CONFIG, text=WORDS * 60)
        began = time.monotonic()
        code = finish(in_a_fork(place, before=interrupting(stage, number)))
        seconds = time.monotonic() - began
        reported = (place / "out.txt").read_text().splitlines()[-1:]
        left = [path.name for path in list_checkpoints(place / "checkpoints")]
        again = finish(in_a_fork(place, "--resume", "auto"))
        same = again == 0 and outcome(place / "checkpoints", STEPS) == expected
        trial = {
            "stage": stage.title,
            "signal": int(number),
            "signals": stage.signals,
            "code": code,
            "reported": reported,
        }
        print(
            json.dumps({**trial, "left": left, "resumed": again, "same": same, "seconds": round(seconds, 2)}),
            flush=True,
        )


def try_kills(folder: Path, kills: int, seed: int) -> None:
    """kill -9 at random moments, each time `--resume auto`, until as many kills have fallen: run after run."""
    began = time.monotonic()
    expected = make_whole(folder / "whole")
    usual = time.monotonic() - began
    chance, done, index = random.Random(seed), 0, 0
    while done < kills:
        place, fallen, index = folder / str(index), 0, index + 1
        write_tiny(place, config=CONFIG, text=WORDS * 60)
        halves = 0
        while True:
            child = in_a_fork(place, "--resume", "auto")
            if fallen < 3 and done < kills:
                time.sleep(chance.uniform(0.1, 0.9) * usual)
                os.kill(child, signal.SIGKILL)
            code = finish(child)
            if code != -signal.SIGKILL:
                break
            fallen, done = fallen + 1, done + 1
            halves += any(place.glob("checkpoints/.step_*.tmp.*"))
        same = code == 0 and outcome(place / "checkpoints", STEPS) == expected
        print(json.dumps({"run": index, "kills": fallen, "in_a_save": halves, "code": code, "same": same}), flush=True)
        if not fallen:
            usual *= 0.8


def write_trials(arguments: list[str], out: Path, err: Path) -> None:
    """Write the trials and errors of `main` to two files."""
    with out.open("w") as output, err.open("w") as errors, contextlib.redirect_stdout(output):
        try:
            main(arguments)
        except BaseException:
            traceback.print_exc(file=errors)
            raise


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["signals", "kills"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stage", action="append", default=[])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.what == "signals":
        try_signals(args.folder, args.stage)
    else:
        try_kills(args.folder, args.kills, args.seed)


if __name__ == "__main__":
    main()
