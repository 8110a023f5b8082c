"""Disks that break on demand: an `IoOps` that asks the test before each operation, and a fork to die in."""

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from smollm2.storage.atomic import IoOps

OPERATIONS = [name for name in vars(IoOps) if not name.startswith("_")]


class WatchedIo(IoOps):
    """Calls `before(number, name, arguments)` ahead of every operation; what it raises is the error of the system."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.before, self.count = before, 0

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name not in OPERATIONS:
            return attribute

        def operation(*arguments: Any) -> Any:
            number, self.count = self.count, self.count + 1
            self.before(number, name, arguments)
            return attribute(*arguments)

        return operation


def record_operations(action: Callable[[IoOps], object]) -> list[tuple[str, tuple[Any, ...]]]:
    """Every operation of an action, in order, with its arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    action(WatchedIo(lambda _, name, arguments: calls.append((name, arguments))))
    return calls


def raising_at(position: int, error: BaseException) -> IoOps:
    """A disk whose operation number `position` fails."""

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == position:
            raise error

    return WatchedIo(before)


def dying_at(position: int) -> IoOps:
    """A disk under which the process dies at operation number `position`; a write is half done by then."""

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == position:
            if name == "write":
                file, data = arguments
                assert isinstance(file, FileIO)
                os.write(file.fileno(), memoryview(data).cast("B")[: len(data) // 2])
            os._exit(9)

    return WatchedIo(before)


def exit_code_in_a_fork(action: Callable[[], object]) -> int:
    """Run an action in a forked child, which ends with 0 where it returns and 1 where it raises."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_temporary(folder: Path, pid: int) -> Path:
    """What a process with this pid leaves behind when it is killed in the middle of a save."""
    path = folder / f".step_0001.pt.tmp.{pid}-0badcafe"
    path.write_bytes(b"half")
    return path
