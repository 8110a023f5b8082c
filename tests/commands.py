"""`smollm2 ...` in processes of their own, forked from a server that has imported the package and computed nothing.

Importing torch and its compiler takes a process about four seconds, which most tests of commands need not wait for. A
forked process is otherwise a real one: it has its own files, folder, environment, signals and exit code.
"""

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from smollm2.cli.main import main

if TYPE_CHECKING:
    import pytest

SERVER = multiprocessing.get_context("forkserver") if os.name == "posix" else multiprocessing.get_context("spawn")
SERVER.set_forkserver_preload(["smollm2.training.loop", "torch._dynamo"])


def _become(arguments: list[str], folder: Path, environment: Mapping[str, str], streams: Path) -> None:
    """Run the command line in this process, with its streams in files, and exit as it does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, mode) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))):
        descriptor = os.open(streams / name, mode)
        os.dup2(descriptor, number)
        os.close(descriptor)
        stream: TextIO = io.TextIOWrapper(io.FileIO(number, "r" if number == 0 else "w"), "utf-8", line_buffering=True)
        setattr(sys, name, stream)
    sys.argv = ["smollm2", *arguments]
    sys.exit(main(arguments))


class Command:
    """A command that runs."""

    def __init__(self, *arguments: str, folder: Path, text: str = "", env: Mapping[str, str] | None = None) -> None:
        self.arguments, self.streams = arguments, tempfile.TemporaryDirectory()
        streams = Path(self.streams.name)
        for name, content in (("stdin", text), ("stdout", ""), ("stderr", "")):
            (streams / name).write_text(content)
        environment = dict(os.environ if env is None else env)
        self.process = SERVER.Process(target=_become, args=(list(arguments), folder, environment, streams))
        self.process.start()

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """Return how it ended and what it printed. Raise TimeoutExpired if it takes longer."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        out, err = (Path(self.streams.name, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, out, err)


def run(
    *arguments: str, folder: Path, text: str = "", env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `smollm2 ...` in a folder to its end."""
    return Command(*arguments, folder=folder, text=text, env=env).wait()


def run_function(function: Callable[..., None], *arguments: object) -> None:
    """Run a function of a test file in a process of its own; it must return."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def check_refused(
    arguments: list[str], code: int, words: str, folder: Path, capsys: "pytest.CaptureFixture[str]"
) -> None:
    """Run the command here; it must end with `code` and one line that holds `words`, and leave no file in `folder`."""
    before = sorted(folder.rglob("*"))
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
