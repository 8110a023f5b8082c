"""The lock of a run folder."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from smollm2.errors import ResourceError
from smollm2.storage.atomic import _reason, remove_stale_temporaries
from smollm2.storage.processes import is_running


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Hold a folder; a kill frees it. False where its file system has no locks, and then nobody is kept out.

    Removes what killed runs left half written. Raises ResourceError, naming the holder, where another run has it.
    """
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise ResourceError(f"{path} - it cannot be opened: {_reason(error)} - choose another --save_dir") from error
    held = [handle]
    # A forked child shares the lock and would keep it when this process is killed. A child that runs another program
    # does not: Python's handles close there.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _close_all(held))
    try:
        locked = _take_lock(handle)
        if locked is None:
            raise ResourceError(
                f"{folder} - another run holds it: {_read_holder(path)} - wait for it, stop it, or choose another --save_dir"
            )
        if locked:
            _write_holder(handle)
            remove_stale_temporaries(folder)
        yield locked
    finally:
        _close_all(held)


def is_held(folder: Path) -> bool:
    """Whether the process that last took the folder's lock is there, as far as this machine can say. Takes nothing."""
    try:
        holder = json.loads((folder / ".lock").read_bytes())
        return bool(holder["boot_id"] == _read_boot_id() and is_running(int(holder["pid"])))
    except (OSError, ValueError, KeyError, TypeError):
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock_or_raise(handle: int) -> None:
        # Windows forbids others to read what is locked: a byte far behind the text is.
        os.lseek(handle, 2**20, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock_or_raise(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take_lock(handle: int) -> bool | None:
    """True: taken; None: another has it; False: this file system has no locks."""
    try:
        _lock_or_raise(handle)
    except OSError as error:
        return None if error.errno in {errno.EAGAIN, errno.EACCES, errno.EDEADLK} else False
    return True


def _write_holder(handle: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": _read_boot_id(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(holder).encode())


def _read_boot_id() -> str:
    """What tells this start of the machine from the one before; empty where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said which it is"


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())
