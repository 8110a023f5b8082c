"""Atomic writes of files and folders: each is written completely or not at all.

A file is written under a temporary name, synced, checked and renamed, and then its folder is synced. Because of this
order, a crash at any point leaves either the old file or the new one. These operations go through `IoOps`, so tests can
make each of them fail.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from smollm2.errors import ResourceError, Smollm2Error
from smollm2.storage.processes import is_running

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error numbers for an operation that the file system does not support."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers for a full disk, an exhausted quota, and a file larger than allowed."""

SECONDS_PER_DAY = 86400

TEMPORARY = re.compile(r"\..+\.tmp\.([0-9]+)-[0-9a-f]+")


class IoOps:
    """The system calls needed to save a file, one method per call. Tests wrap it to record calls or make them fail."""

    def free_bytes(self, folder: Path) -> int:
        """Return how many bytes this user may still write to the disk that the folder is on."""
        return shutil.disk_usage(folder).free

    def open_temporary(self, path: Path) -> FileIO:
        """Create a file that only this user can access. It is unbuffered, so a process crash loses nothing written."""
        return FileIO(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))

    def allocate(self, file: FileIO, size: int) -> None:
        """Reserve `size` bytes, so that a full disk is detected before anything is written."""
        if size and hasattr(os, "posix_fallocate"):
            with _ignoring_unsupported():
                os.posix_fallocate(file.fileno(), 0, size)

    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        """Write all of `data`; a single system call may write only part of it."""
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[file.write(rest) :]

    def truncate(self, file: FileIO) -> None:
        """Release the reserved bytes beyond the last one written."""
        file.truncate(file.tell())

    def fsync(self, file: FileIO) -> None:
        """Flush the file to disk and drop it from the page cache, so that a later check reads from the disk."""
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def replace(self, source: Path, target: Path) -> None:
        """Rename `source` to `target`, replacing any existing file of that name."""
        source.replace(target)

    def fsync_dir(self, folder: Path) -> None:
        """Flush the folder's directory entries to disk, if the system can."""
        if os.name == "nt":
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            with _ignoring_unsupported():
                os.fsync(handle)
        finally:
            os.close(handle)

    def unlink(self, path: Path) -> None:
        """Remove a file, or a symbolic link but not its target."""
        path.unlink()

    def listdir(self, folder: Path) -> list[str]:
        """Return the names in a folder, in arbitrary order."""
        return [path.name for path in folder.iterdir()]


IO_OPS = IoOps()


class Target:
    """The file object passed to a writer callback; it writes through `io_ops`."""

    def __init__(self, file: FileIO, io_ops: IoOps) -> None:
        self.file, self.io_ops = file, io_ops

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data` and return its length, as a file object does."""
        self.io_ops.write(self.file, data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


def write_atomically(
    path: Path,
    content: bytes | Callable[[Target], object],
    *,
    size: int = 0,
    check: Callable[[Path], object] | None = None,
    io_ops: IoOps = IO_OPS,
) -> None:
    """Write a file completely or not at all: `path` keeps its old content until the new content is on disk.

    `content` is bytes, or a function that writes about `size` bytes to the file object it is given. `check` is called
    with the temporary file's path before the rename, and raises if the content is wrong. Raise ResourceError on a
    system error; a KeyboardInterrupt propagates unchanged.
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
            raise _save_error(path, cause, size, io_ops) from error
        if cause is error:
            raise
        raise cause from None


def write_folder_atomically(
    target: Path, fill: Callable[[Path], object], *, replaces: bool = False, io_ops: IoOps = IO_OPS
) -> None:
    """Write a folder completely or not at all: `fill` writes to a temporary folder, which is then renamed to `target`.

    If `fill` raises, nothing is left behind. With `replaces`, the existing folder `target` is removed once the new one
    is in place. Raise ResourceError on a system error.
    """
    mark = f"tmp.{os.getpid()}-{secrets.token_hex(4)}"
    temporary, replaced = target.with_name(f".export.{mark}"), target.with_name(f".replaced.{mark}")
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_folders(target.parent, io_ops)
        temporary.mkdir()
        fill(temporary)
        io_ops.fsync_dir(temporary)
        if replaces:
            io_ops.replace(target, replaced)
        try:
            io_ops.replace(temporary, target)
        except BaseException:
            if replaces:
                replaced.rename(target)
            raise
        io_ops.fsync_dir(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise _save_error(target, error, 0, io_ops) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Flush an already closed file to disk. It is reopened for writing, because Windows can sync only such a file."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path, option: str = "--save_dir") -> list[Path]:
    """Create a folder and its parents; return the ones that were created, innermost first.

    Raise ResourceError, which names the option for choosing another folder, if that is not possible.
    """
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            try:
                if not path.is_dir():
                    path.mkdir()
                    made.insert(0, path)
            except FileExistsError:
                if not path.is_dir():  # otherwise another process has just created it
                    raise
    except (OSError, ValueError) as error:
        raise folder_error(folder, error, option) from error
    return made


def probe_folder(folder: Path, option: str = "--save_dir") -> None:
    """Create the folder and write a test file to it, to find out at the start whether saving is possible.

    Raise ResourceError, which names the option for choosing another folder, if it is not.
    """
    make_folder(folder, option)
    probe = folder / f".probe.{os.getpid()}"
    try:
        write_atomically(probe, b"probe")
        probe.unlink(missing_ok=True)
    except (OSError, ResourceError) as error:
        cause = error.__cause__ if isinstance(error, ResourceError) else error
        if not isinstance(cause, OSError):
            raise
        raise folder_error(folder, cause, option) from error


def remove_stale_temporaries(folder: Path, io_ops: IoOps = IO_OPS) -> None:
    """Remove temporary files and folders of processes that have ended. Only the holder of the folder's lock may call this."""
    for name in io_ops.listdir(folder):
        match = TEMPORARY.fullmatch(name)
        if match and not is_running(int(match[1])):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder / name) if (folder / name).is_dir() else io_ops.unlink(folder / name)


def _remove_abandoned_folders(parent: Path, io_ops: IoOps) -> None:
    """Remove temporary folders of killed exports that are over a day old.

    Newer ones are kept, because they may belong to a process on another machine.
    """
    for name in io_ops.listdir(parent):
        match, path = TEMPORARY.fullmatch(name), parent / name
        if match and name.startswith(".export.") and not is_running(int(match[1])):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_PER_DAY:
                    shutil.rmtree(path)


def describe_problem(path: Path, error: Exception) -> str:
    """Return why `path` cannot be used, for a system error whose own message would be misleading.

    The system reports "File exists" for a dangling link, and "No such file" for a missing folder.
    """
    if isinstance(error, ValueError):
        return "the name contains a NUL character"
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENAMETOOLONG:
        return "the name is too long"
    if code in (errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ELOOP):
        for part in [*reversed(path.parents), path]:
            name = "it" if part == path else str(part)
            try:
                if not stat.S_ISDIR(part.stat().st_mode) and (part != path or code != errno.ENOENT):
                    return f"{name} is a file, not a folder"
            except OSError as found:
                if found.errno == errno.ELOOP:
                    return f"{name} is a symbolic link that leads back to itself"
                if part.is_symlink():
                    return f"{name} is a symbolic link to {part.readlink()}, which does not exist"
                return f"the folder {part} does not exist"
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return reason[:1].lower() + reason[1:]


def folder_error(folder: Path, error: Exception, option: str) -> ResourceError:
    """Return the error for a folder that cannot be written to; `option` is the flag for choosing another folder."""
    problem = describe_problem(folder, error)
    where = str(folder).replace("\0", "\\0")
    return ResourceError(where, f"cannot be written to: {problem}", f"{_advice(error)} another {option}")


def _advice(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in FULL:
        return "Free some space, or choose"
    return "Make it writable, or choose" if code in (errno.EACCES, errno.EPERM, errno.EROFS) else "Choose"


def _save_error(path: Path, error: OSError, size: int, io_ops: IoOps) -> ResourceError:
    need = ""
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            need = f" ({size:,} bytes are needed, {io_ops.free_bytes(path.parent):,} are free)"
    problem = describe_problem(path.parent, error)
    return ResourceError(path, f"was not saved: {problem}{need}", f"{_advice(error)} another folder")


def _hidden_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return the original error behind a library's own: torch turns a full disk or Ctrl-C into a RuntimeError.

    `outer` is the exception that the caller was already handling; its own chain is not searched.
    """
    found: BaseException | None = error
    while found is not None and found is not outer:
        if isinstance(found, OSError) or not isinstance(found, Exception):
            return found
        found = found.__context__
    return error


@contextlib.contextmanager
def _ignoring_unsupported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
