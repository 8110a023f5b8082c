"""Files that are whole or not there at all, and folders that one run holds.

A file is written under a temporary name, synced, checked, renamed, and then its folder is synced: in this order a crash
at any point leaves the old file or the new one. All of it goes through `IoOps`, so that a test can break each operation
in its turn.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from smollm2.errors import ResourceError, Smollm2Error
from smollm2.storage.processes import is_running

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system answers that lacks an operation."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a disk answers that has no room, for anyone, for this user, for so large a file."""

SECONDS_PER_DAY = 86400

TEMPORARY = re.compile(r"\..+\.tmp\.([0-9]+)-[0-9a-f]+")


class IoOps:
    """What a save asks of the system, one method an operation. Tests wrap it to count, fail, crash or record."""

    def free_bytes(self, folder: Path) -> int:
        """Bytes that this user may still write on the folder's disk."""
        return shutil.disk_usage(folder).free

    def open_temporary(self, path: Path) -> FileIO:
        """A new file for this user alone, without a buffer: what was written is the system's."""
        return FileIO(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))

    def allocate(self, file: FileIO, size: int) -> None:
        """Claim the room, so that a disk without it says so before a byte is written."""
        if size and hasattr(os, "posix_fallocate"):
            with _tolerating_what_is_unsupported():
                os.posix_fallocate(file.fileno(), 0, size)

    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        """All of `data`; the system may take less at a time."""
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[file.write(rest) :]

    def truncate(self, file: FileIO) -> None:
        """Give back the room behind the last byte written."""
        file.truncate(file.tell())

    def fsync(self, file: FileIO) -> None:
        """Onto the disk, and out of the page cache: what is checked afterwards comes from the disk."""
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, over whatever has the name."""
        source.replace(target)

    def fsync_dir(self, folder: Path) -> None:
        """The folder's list of names onto the disk, where a system can do that."""
        if os.name == "nt":
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            with _tolerating_what_is_unsupported():
                os.fsync(handle)
        finally:
            os.close(handle)

    def unlink(self, path: Path) -> None:
        """Remove one name; a link itself, never what it points to."""
        path.unlink()

    def listdir(self, folder: Path) -> list[str]:
        """The names in a folder, in no order."""
        return [path.name for path in folder.iterdir()]


IO_OPS = IoOps()


class Target:
    """What a writer callback writes to; it hands everything to `io_ops`."""

    def __init__(self, file: FileIO, io_ops: IoOps) -> None:
        self.file, self.io_ops = file, io_ops

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`; returns its length, as files do."""
        self.io_ops.write(self.file, data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits here."""


def write_atomically(
    path: Path,
    content: bytes | Callable[[Target], object],
    *,
    size: int = 0,
    check: Callable[[Path], object] | None = None,
    io_ops: IoOps = IO_OPS,
) -> None:
    """Write a file whole or not at all; `path` holds the old content until the new one lies on the disk.

    `content` is bytes, or a function that writes about `size` bytes. `check` reads the temporary file before it gets its
    name, and raises what it finds. Raises ResourceError where the system refuses; KeyboardInterrupt comes out as itself.
    """
    outer = sys.exc_info()[1]
    size = len(content) if isinstance(content, bytes) else size
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        if io_ops.free_bytes(path.parent) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with io_ops.open_temporary(temporary) as file:
                io_ops.allocate(file, size)
                target = Target(file, io_ops)
                target.write(content) if isinstance(content, bytes) else content(target)
                io_ops.truncate(file)
                io_ops.fsync(file)
            if check:
                check(temporary)
            io_ops.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                io_ops.unlink(temporary)
            raise
        io_ops.fsync_dir(path.parent)
    except Smollm2Error:
        raise
    except BaseException as error:
        cause = _hidden_cause(error, outer)
        if isinstance(cause, OSError):
            raise ResourceError(_describe_failure(path, cause, size, io_ops)) from error
        if cause is error:
            raise
        raise cause from None


def write_folder_atomically(
    target: Path, fill: Callable[[Path], object], *, replaces: bool = False, io_ops: IoOps = IO_OPS
) -> None:
    """Make a folder whole or not at all: `fill` writes it under a temporary name beside `target`, then it is renamed.

    What `fill` raises comes out, and nothing is left behind. With `replaces` a folder of the name gives way at the end.
    Raises ResourceError where the system refuses.
    """
    mark = f"tmp.{os.getpid()}-{secrets.token_hex(4)}"
    temporary, aside = target.with_name(f".export.{mark}"), target.with_name(f".replaced.{mark}")
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_folders(target.parent, io_ops)
        temporary.mkdir()
        fill(temporary)
        io_ops.fsync_dir(temporary)
        if replaces:
            io_ops.replace(target, aside)
        try:
            io_ops.replace(temporary, target)
        except BaseException:
            if replaces:
                aside.rename(target)
            raise
        io_ops.fsync_dir(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise ResourceError(_describe_failure(target, error, 0, io_ops)) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def probe_folder(folder: Path) -> None:
    """Make the folder and write a file in it, now and not at the first save. Raises ResourceError where that fails."""
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"probe")
        probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{folder} - it cannot be written: {_reason(error)} - make it writable or choose another --save_dir"
        ) from error


def remove_stale_temporaries(folder: Path, io_ops: IoOps = IO_OPS) -> None:
    """Remove temporary files of processes that are gone. Only the holder of the folder's lock may call this."""
    for name in io_ops.listdir(folder):
        match = TEMPORARY.fullmatch(name)
        if match and not is_running(int(match[1])):
            with contextlib.suppress(OSError):
                io_ops.unlink(folder / name)


def _remove_abandoned_folders(parent: Path, io_ops: IoOps) -> None:
    """Remove what killed exports left here; only after a day, because another machine's process may be writing it."""
    for name in io_ops.listdir(parent):
        match, path = TEMPORARY.fullmatch(name), parent / name
        if match and name.startswith(".export.") and not is_running(int(match[1])):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_PER_DAY:
                    shutil.rmtree(path)


def _hidden_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """What a library hid behind an error of its own: torch turns a full disk and Ctrl-C alike into a RuntimeError.

    `outer` is what the caller was handling already; from there on the chain is the caller's.
    """
    found: BaseException | None = error
    while found is not None and found is not outer:
        if isinstance(found, OSError) or not isinstance(found, Exception):
            return found
        found = found.__context__
    return error


def _describe_failure(path: Path, error: OSError, size: int, io_ops: IoOps) -> str:
    need = ""
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            need = f"; {size:,} bytes are needed and {io_ops.free_bytes(path.parent):,} are free"
    advice = "free some space" if error.errno in FULL else "make the folder writable"
    return f"{path} - it was not saved: {_reason(error)}{need} - {advice} or choose another folder"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextlib.contextmanager
def _tolerating_what_is_unsupported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
