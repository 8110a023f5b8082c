"""Errors that a user can cause and correct, with their exit codes.

    Smollm2Error
    ├── ConfigError      2   an invalid key, value or flag, or a missing extra
    ├── DataError        3   an unusable text, tokenizer or token cache
    ├── CheckpointError  4   a checkpoint or an export that is missing, damaged, or from another run or program
    ├── TrainingError    5   a run that cannot continue: non-finite numbers, a failed check, ranks that disagree
    ├── ResourceError    6   too little disk space or memory, or a folder that is not writable or in use by another run
    └── Interrupted      130, 143 or 138 after SIGINT, SIGTERM or SIGUSR1; 75 at training.time_limit. It can be resumed

A message has three parts, given as arguments and formatted here: `where: what is wrong (with the value). What to do.`
"""

from pathlib import Path

EXIT_CODE_FILE = "SMOLLM2_EXIT_CODE_FILE"
"""The environment variable with the path of the file for rank 0's exit code; torchrun returns 1 for every failure."""

TIME_LIMIT_EXIT_CODE = 75
"""EX_TEMPFAIL from sysexits.h: a job scheduler can tell a run that reached its time limit from a finished one."""


class Smollm2Error(Exception):
    """A failure that a user can cause and correct; `exit_code` is the exit code of the command.

    If several processes fail for the same reason, only the process with rank `rank` reports it.
    """

    exit_code = 1
    rank = 0

    def __init__(self, where: str | Path, what: str = "", advice: str = "") -> None:
        """Lay out the message. `where` is a file, key or flag, `what` the problem with the value, `advice` what to do.

        If only `where` is given, it is a complete, already formatted message, such as a list of config problems.
        """
        super().__init__(lay_out(where, what, advice))


def lay_out(where: str | Path, what: str = "", advice: str = "") -> str:
    """Return `where: what. Advice.`; if a part is empty, its punctuation is omitted as well."""
    head = f"{where}: {what}" if str(where) and what else f"{where}{what}"
    if not advice:
        return head
    return f"{head}{'' if head.endswith(('.', '!', '?')) else '.'} {advice[0].upper()}{advice[1:]}{'' if advice.endswith(('.', '!', '?')) else '.'}"


class ConfigError(Smollm2Error):
    """A config file, a flag or a command's usage is wrong."""

    exit_code = 2


class DataError(Smollm2Error):
    """The input text, the tokenizer or the token cache cannot be used."""

    exit_code = 3


class CheckpointError(Smollm2Error):
    """A checkpoint or an exported folder is missing, damaged or from another run, or would be overwritten."""

    exit_code = 4


class TrainingError(Smollm2Error):
    """The run cannot continue."""

    exit_code = 5


class ResourceError(Smollm2Error):
    """The machine lacks a resource: disk space, memory, or a writable folder that no other run is using."""

    exit_code = 6


class Interrupted(Smollm2Error):
    """A signal, or the time limit (`signal_number` 0), ended the run, which can be resumed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number if signal_number else TIME_LIMIT_EXIT_CODE
