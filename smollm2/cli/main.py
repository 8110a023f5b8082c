"""The command `smollm2`: parser, dispatch, exit codes and the printing of errors."""

import atexit
import gc
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from smollm2 import __version__
from smollm2.cli import (
    chat,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    import_model,
    landscape,
    plan,
    prepare,
    replay,
    report,
    train,
    verify,
)
from smollm2.cli.environment import clean_environment
from smollm2.cli.flags import Parser
from smollm2.cli.run_flags import describe_unknown, load_run_config
from smollm2.errors import (
    EXIT_CODE_FILE,
    ConfigError,
    Interrupted,
    ResourceError,
    Smollm2Error,
    lay_out,
)

COMMANDS = (
    train,
    plan,
    doctor,
    prepare,
    generate,
    chat,
    evaluate,
    export,
    import_model,
    convert,
    landscape,
    replay,
    report,
    verify,
)


# When Python ends, it looks for garbage among all objects: with torch's modules that takes about half a second.
atexit.register(gc.freeze)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="smollm2", description="Train SmolLM2-class language models from text.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"smollm2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    Under the launcher of run_training.sh, rank 0 writes its exit code to a file and all ranks return 0: for any other
    code, torchrun returns 1 and prints 30 lines about it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # LC_ALL=C, PYTHONIOENCODING=ascii: escape what cannot be encoded
            stream.reconfigure(errors="backslashreplace")
    code = run_command(argv)
    path = os.environ.get(EXIT_CODE_FILE)
    if not path:
        return code
    if os.environ.get("RANK", "0") == "0":
        Path(path).write_text(str(code), encoding="ascii")
    return 0


def run_command(argv: Sequence[str] | None) -> int:
    """Run one command; return its exit code."""
    try:
        code = dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # `smollm2 ... | head`
        output_fails()
        return 0
    except OSError as error:
        if not output_fails():
            raise
        problem = ResourceError("standard output", f"cannot be written to ({error.strerror})", "free some space")
        report_error(problem, 0, 0)
        return problem.exit_code
    except Smollm2Error as error:
        rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
        report_error(error, int(rank) if rank.isdecimal() else 0, int(local_rank) if local_rank.isdecimal() else 0)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def dispatch(argv: Sequence[str] | None) -> int:
    """Parse the command line and run its command; without a command, print the help and return 2."""
    clean_environment(os.environ)
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    args.unknown = unknown
    if args.command is None:
        refuse_unknown(parser, unknown)
        parser.print_help()
        return 2
    if args.command not in (
        "train",
        "plan",
        "doctor",
        "prepare",
    ):  # these report unknown flags with the other problems of their config
        refuse_unknown(args.parser, unknown)
    args.run(args)
    return 0


def check_config(argv: Sequence[str]) -> int:
    """Return 0 if `train` accepts these arguments, else print why not and return the exit code. It is called before
    several processes are started."""
    try:
        args, unknown = build_parser().parse_known_args(["train", *argv])
        load_run_config(args, unknown)
    except Smollm2Error as error:
        report_error(error, 0, 0)
        return error.exit_code
    return 0


def refuse_unknown(parser: Parser, words: Sequence[str]) -> None:
    """Raise ConfigError, with a line for each argument that the parser does not know, if there are any."""
    if words:
        raise ConfigError("\n".join(lay_out(*problem) for problem in describe_unknown(parser, words)))


def output_fails() -> bool:
    """Return whether standard output can no longer be written; if so, discard what is left in its buffer."""
    try:
        print(flush=True)  # flush() alone does not test an unbuffered stream
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def report_error(error: Smollm2Error, rank: int, local_rank: int) -> None:
    """Print an error if this is the rank that reports it. A config error is printed once per machine: ranks read the
    config before they can agree on which one reports it."""
    if rank == error.rank or (isinstance(error, ConfigError) and local_rank == 0):
        where = "" if isinstance(error, Interrupted) else f"error: rank {rank}: " if rank else "error: "
        print(error if "\n" in str(error) else f"{where}{error}", file=sys.stderr)
