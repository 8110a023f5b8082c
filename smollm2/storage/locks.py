"""The lock of a run folder: only one run at a time writes to it.

It is an operating-system lock on the file `.lock`, so it is released as soon as the process that holds it ends, even
after `kill -9`. The text in `.lock` describes that process.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smollm2.errors import ResourceError
from smollm2.storage.atomic import folder_error, make_folder, probe_folder, remove_stale_temporaries
from smollm2.storage.processes import is_running, start_time
from smollm2.storage.run_folder import LOCK


@dataclass
class HeldFolder:
    """A run folder that this process has locked. `made` lists the folders that it created, the run folder first."""

    path: Path
    made: list[Path]
    is_exclusive: bool  # False if the file system does not support locks: other runs are not kept out
    is_discarded: bool = False

    def discard(self) -> None:
        """Mark the folder for removal when the lock is released. A folder that this process did not create is kept."""
        self.is_discarded = True


@contextlib.contextmanager
def lock_folder(folder: Path, option: str = "--save_dir") -> Iterator[HeldFolder]:
    """Create the folder if it is missing, check that it is writable, and hold its lock inside the `with` block.

    Also remove the temporary files of killed processes. Raise ResourceError if the folder cannot be written to, or if
    another run holds the lock; the message names that run, and the option that chooses another folder.
    """
    handle, is_exclusive, made = _open_locked(folder, option)
    lock = [handle]
    # A forked child shares the lock and would still hold it after this process is killed. If a child runs another
    # program, the lock file is closed anyway: Python's file descriptors are not inherited.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _close_all(lock))
    held = HeldFolder(folder, made, is_exclusive, is_discarded=True)
    try:
        try:
            if is_exclusive:
                _write_holder(handle)
                remove_stale_temporaries(folder)
            probe_folder(folder, option)
            held.is_discarded = False
            yield held
        finally:
            if held.is_discarded and held.made and held.is_exclusive:
                _remove(held, lock)
    finally:
        _close_all(lock)


def is_held(folder: Path) -> bool:
    """Return whether the process that last took the folder's lock is still running on this machine.

    The lock is not taken.
    """
    try:
        holder = json.loads((folder / LOCK).read_bytes())
        started = holder.get("process_started")
        return bool(holder["boot_id"] == _read_boot_id()) and is_running(int(holder["pid"]), started)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _open_locked(folder: Path, option: str) -> tuple[int, bool, list[Path]]:
    """Open `.lock` and lock it; return its descriptor, whether the file system supports locks, and the folders created.

    Before the lock is taken, another process that holds it may remove the folder and the file; in that case, start
    over.
    """
    path = folder / LOCK
    while True:
        made = make_folder(folder, option)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except OSError as error:
            if path.is_symlink():  # another user may have made it point anywhere
                raise ResourceError(path, "is a symbolic link", f"remove it, or choose another {option}") from None
            if not folder.exists():
                continue
            raise folder_error(folder, error, option) from error
        taken = _take_lock(handle)
        if taken is None:
            os.close(handle)
            raise ResourceError(
                folder,
                f"is in use by another run ({_describe_holder(path)})",
                f"wait for it, stop it, or choose another {option}",
            )
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle, taken, made
        os.close(handle)


def _remove(held: HeldFolder, lock: list[int]) -> None:
    """Remove the folder, `.lock` last: until then no other run can start writing to it."""
    for path in held.path.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    if os.name == "nt":  # Windows cannot remove an open file
        _close_all(lock)
    with contextlib.suppress(OSError):
        (held.path / LOCK).unlink()
        for folder in held.made:
            folder.rmdir()


if sys.platform == "win32":
    import msvcrt

    def _lock_or_raise(handle: int) -> None:
        # Windows does not let other processes read a locked range: lock one byte far beyond the text.
        os.lseek(handle, 2**20, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock_or_raise(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take_lock(handle: int) -> bool | None:
    """Return True if the lock was taken, None if another process holds it, False if the file system lacks locks."""
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
        "process_started": start_time(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(holder).encode())


def _read_boot_id() -> str:
    """Return an ID of the machine's current boot, or "" if the system provides none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())
