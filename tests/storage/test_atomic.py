import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from io_faults import (
    WatchedIo,
    dying_at,
    exit_code_in_a_fork,
    raising_at,
    record_operations,
    write_temporary,
)

from smollm2.errors import ResourceError
from smollm2.storage.atomic import IoOps, Target, probe_folder, write_atomically
from smollm2.storage.locks import is_held, lock_folder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def hide_behind_a_runtime_error(write: Callable[[], object]) -> None:
    """What torch does with an error of its file."""
    try:
        write()
    except BaseException:
        raise RuntimeError("unexpected pos 576 vs 534")  # noqa: B904


def test_the_data_is_synced_before_the_rename_and_the_folder_after_it(tmp_path: Path) -> None:
    """Promise A3."""
    path = tmp_path / "file"
    calls = record_operations(lambda io_ops: write_atomically(path, b"text", io_ops=io_ops))
    assert [name for name, _ in calls] == [
        "free_bytes",
        "open_temporary",
        "allocate",
        "write",
        "truncate",
        "fsync",
        "replace",
        "fsync_dir",
    ]
    assert calls[-2][1][1] == path and calls[-1][1] == (tmp_path,)


def test_the_check_sees_the_synced_file_before_it_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = []
    write_atomically(path, b"new", check=lambda temporary: seen.append((temporary.read_bytes(), path.exists())))
    assert seen == [(b"new", False)]


def test_what_the_check_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ResourceError, match=r"^bad$"):
        write_atomically(path, b"new", check=lambda _: (_ for _ in ()).throw(ResourceError("bad")))
    assert [found.name for found in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("content", [b"", b"text", bytes(3_000_000)], ids=len)
def test_a_file_holds_what_was_written_and_no_more(tmp_path: Path, content: bytes) -> None:
    write_atomically(tmp_path / "file", content)
    write_atomically(tmp_path / "by_callback", lambda file: file.write(content), size=2 * len(content))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "by_callback").read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_is_its_users_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_operation_leaves_the_old_file_or_the_new_one_and_nothing_else(
    tmp_path: Path, position: int, code: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ResourceError, match=f"^{path} - it was not saved: {os.strerror(code)}"):
        write_atomically(path, b"new", io_ops=raising_at(position, OSError(code, os.strerror(code))))
    assert path.read_bytes() == (b"new" if position == 7 else b"old")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@needs_fork
@pytest.mark.parametrize("position", range(8))
def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    io_ops = dying_at(position)
    assert exit_code_in_a_fork(lambda: write_atomically(path, b"new", io_ops=io_ops)) == 9
    assert path.read_bytes() == (b"new" if position == 7 else b"old")


def test_a_full_disk_is_found_before_a_byte_is_written_and_told_with_both_numbers(tmp_path: Path) -> None:
    """Promise A4."""

    class FullDisk(IoOps):
        def free_bytes(self, folder: Path) -> int:
            return 1234

    with pytest.raises(ResourceError, match=r"file - .*; 5,000 bytes are needed and 1,234 are free - free some space"):
        write_atomically(tmp_path / "file", lambda file: pytest.fail("it was written"), size=5000, io_ops=FullDisk())
    assert list(tmp_path.iterdir()) == []


@needs_fork
def test_a_real_limit_of_the_system_is_told_in_one_line(tmp_path: Path) -> None:
    """Promise A4."""
    resource = pytest.importorskip("resource")

    def write_beyond_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(ResourceError, match=r"^[^\n]*file - [^\n]*5,000 bytes are needed[^\n]*$"):
            write_atomically(tmp_path / "file", bytes(5000))

    assert exit_code_in_a_fork(write_beyond_the_limit) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.EIO, "the disk broke"), ResourceError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_error_that_a_library_hides_comes_out_as_itself(
    tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    def write(file: Target) -> None:
        hide_behind_a_runtime_error(lambda: file.write(b"text"))

    with pytest.raises(expected):
        write_atomically(tmp_path / "file", write, io_ops=raising_at(3, error))
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_the_caller_is_handling_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    def write(file: Target) -> None:
        raise ValueError("a bug")

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="a bug"):
            write_atomically(tmp_path / "file", write)


def test_a_write_that_the_system_cuts_short_is_completed(tmp_path: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.taken = bytearray()

        def write(self, data: memoryview) -> int:
            self.taken += data[:3]
            return min(3, len(data))

    slow = Slow()
    IoOps().write(slow, b"0123456789")  # type: ignore[arg-type]
    assert slow.taken == b"0123456789"


def test_the_probe_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    probe_folder(tmp_path / "a" / "b")
    probe_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text")
    return tmp_path / "file"


def a_dead_link(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link"


def a_link_to_itself(tmp_path: Path) -> Path:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path / "loop"


def a_read_only_folder(tmp_path: Path) -> Path:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        pytest.skip("root writes where it likes")
    tmp_path.chmod(0o500)
    return tmp_path


def a_folder_of_the_kernel(tmp_path: Path) -> Path:
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    return Path("/proc/self")


@pytest.mark.parametrize(
    "make",
    [
        a_file,
        lambda tmp_path: a_file(tmp_path) / "below",
        a_dead_link,
        a_link_to_itself,
        a_read_only_folder,
        a_folder_of_the_kernel,
        lambda tmp_path: tmp_path / ("x" * 300),
        lambda tmp_path: tmp_path / "a\0b",
    ],
    ids=["file", "below a file", "dead link", "link to itself", "read-only", "kernel's", "long name", "NUL"],
)
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Promise A5."""
    folder = make(tmp_path)
    with pytest.raises(ResourceError) as raised:
        probe_folder(folder)
    assert str(raised.value).startswith(str(folder)) and "\n" not in str(raised.value)


def test_a_folder_that_vanished_is_told_at_the_write(tmp_path: Path) -> None:
    """Promise A5."""
    with pytest.raises(ResourceError, match="gone/file - it was not saved: No such file"):
        write_atomically(tmp_path / "gone" / "file", b"text")


def test_a_folder_is_held_while_its_process_is_there(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with lock_folder(tmp_path):
        assert is_held(tmp_path)
    holder = json.loads((tmp_path / ".lock").read_bytes())
    for changed in ({"boot_id": "another start"}, {"pid": 2**22 + 1}, {"pid": "none"}):
        (tmp_path / ".lock").write_text(json.dumps({**holder, **changed}))
        assert not is_held(tmp_path)


def test_a_held_folder_refuses_a_second_run_and_names_the_first(tmp_path: Path) -> None:
    """Promise A9."""
    expected = f"^{tmp_path} - another run holds it: process {os.getpid()} on {socket.gethostname()}, since "
    with lock_folder(tmp_path) as locked:
        assert locked
        with pytest.raises(ResourceError, match=expected), lock_folder(tmp_path):
            pytest.fail("two runs hold one folder")


def test_a_released_folder_can_be_held_again(tmp_path: Path) -> None:
    for _ in range(3):
        with lock_folder(tmp_path):
            holder = json.loads((tmp_path / ".lock").read_bytes())
    assert set(holder) == {"pid", "host", "boot_id", "started"}


HOLD = """
import os, sys, time
from pathlib import Path
from smollm2.storage.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@needs_fork
def test_kill_minus_9_frees_a_folder_while_a_forked_child_lives_on(tmp_path: Path) -> None:
    """Promise A9."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(ResourceError, match=f"process {holder.pid} on"), lock_folder(tmp_path):
                pytest.fail("two runs hold one folder")
            holder.kill()
            holder.wait()
            with lock_folder(tmp_path) as locked:
                os.kill(child, 0)
                assert locked
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


@needs_fork
def test_a_forked_child_that_ends_does_not_free_the_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        assert exit_code_in_a_fork(lambda: None) == 0
        with pytest.raises(ResourceError), lock_folder(tmp_path):
            pytest.fail("two runs hold one folder")


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system opens every link")
def test_a_link_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("text")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(ResourceError, match="lock - it cannot be opened"), lock_folder(tmp_path):
        pytest.fail("a link was taken for the lock")
    assert target.read_text() == "text"


@needs_fork
def test_the_lock_clears_away_what_dead_runs_left_and_only_that(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead, living = write_temporary(tmp_path, child), write_temporary(tmp_path, os.getpid())
    other = tmp_path / "notes.tmp.1-a"
    other.write_text("text")
    with lock_folder(tmp_path):
        assert not dead.exists() and living.exists() and other.exists()


@needs_fork
def test_a_refused_run_clears_nothing_away(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with lock_folder(tmp_path):
        dead = write_temporary(tmp_path, child)
        with pytest.raises(ResourceError), lock_folder(tmp_path):
            pytest.fail("two runs hold one folder")
        assert dead.exists()


def test_every_operation_of_the_seam_can_be_watched() -> None:
    seen: list[str] = []
    disk = WatchedIo(lambda _, name, __: seen.append(name))
    assert disk.free_bytes(Path()) > 0 and disk.listdir(Path(__file__).parent)
    assert seen == ["free_bytes", "listdir"]
