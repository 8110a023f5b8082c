import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from io_faults import (
    WatchedIo,
    dying_at,
    exit_code_in_a_fork,
    raising_at,
    record_operations,
)
from runs import WORDS

from smollm2.data.building import prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import load_tokenizer
from smollm2.errors import ResourceError
from smollm2.exporting.target import finish_files
from smollm2.storage.atomic import IoOps, Target, probe_folder, sync_file, write_atomically
from smollm2.storage.locks import lock_folder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def hide_behind_a_runtime_error(write: Callable[[], object]) -> None:
    """Do what torch does with an error of its file."""
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
    with pytest.raises(ResourceError, match=f"(?i)^{path}: was not saved: {os.strerror(code)}"):
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


def test_a_full_disk_is_found_before_a_byte_is_written_and_reported_with_both_numbers(tmp_path: Path) -> None:
    """Promise A4."""

    class FullDisk(IoOps):
        def free_bytes(self, folder: Path) -> int:
            return 1234

    with pytest.raises(ResourceError, match=r"file: .* \(5,000 bytes are needed, 1,234 are free\)\. Free some space"):
        write_atomically(tmp_path / "file", lambda file: pytest.fail("it was written"), size=5000, io_ops=FullDisk())
    assert list(tmp_path.iterdir()) == []


@needs_fork
def test_a_real_limit_of_the_system_is_reported_in_one_line(tmp_path: Path) -> None:
    """Promise A4."""
    resource = pytest.importorskip("resource")

    def write_beyond_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(ResourceError, match=r"^[^\n]*file: [^\n]*5,000 bytes are needed[^\n]*$"):
            write_atomically(tmp_path / "file", bytes(5000))

    assert exit_code_in_a_fork(write_beyond_the_limit) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.EIO, "the disk broke"), ResourceError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_error_that_a_library_hides_is_raised_as_itself(
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


def test_a_partial_write_of_the_system_is_completed(tmp_path: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.taken = bytearray()

        def write(self, data: memoryview) -> int:
            self.taken += data[:3]
            return min(3, len(data))

    slow = Slow()
    IoOps().write(slow, b"0123456789")  # type: ignore[arg-type]
    assert slow.taken == b"0123456789"


@pytest.fixture
def fsync_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fsync refuse a file that is open for reading only, as Windows does."""
    fcntl = pytest.importorskip("fcntl")
    fsync = os.fsync

    def refuse_readers(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_folder and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "fsync of a file that is open for reading")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_readers)


@pytest.mark.usefixtures("fsync_of_windows")
def test_files_are_synced_as_windows_needs_it_when_they_are_written_stored_or_exported(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"text")
    sync_file(path)
    finish_files(tmp_path)
    text = tmp_path / "input.txt"
    text.write_text(WORDS * 20)
    store = prepare_tokens(open_text(str(text), tmp_path), load_tokenizer("bytes"), tmp_path / "cache", 0.1)
    assert len(store.train) > 0


def test_the_probe_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    probe_folder(tmp_path / "a" / "b")
    probe_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def make_and_lock(folder: Path) -> None:
    with lock_folder(folder):
        pass


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
    ("make", "problem", "advice"),
    [
        (a_file, "it is a file, not a folder", "Choose another --save_dir."),
        (lambda tmp_path: a_file(tmp_path) / "below", "file is a file, not a folder", "Choose another --save_dir."),
        (a_dead_link, "it is a symbolic link to {}/nowhere, which does not exist", "Choose another --save_dir."),
        (lambda tmp_path: a_dead_link(tmp_path) / "below", "link is a symbolic link to {}/nowhere, which does not", ""),
        (a_link_to_itself, "it is a symbolic link that leads back to itself", "Choose another --save_dir."),
        (
            lambda tmp_path: a_link_to_itself(tmp_path) / "below",
            "loop is a symbolic link that leads back to itself",
            "",
        ),
        (a_read_only_folder, "permission denied", "Make it writable, or choose another --save_dir."),
        (a_folder_of_the_kernel, "", "hoose another --save_dir."),
        (lambda tmp_path: tmp_path / ("x" * 300), "the name is too long", "Choose another --save_dir."),
        (lambda tmp_path: tmp_path / "a\0b", "the name contains a NUL character", "Choose another --save_dir."),
    ],
    ids=[
        "file",
        "below a file",
        "dead link",
        "below a dead link",
        "link to itself",
        "below a link to itself",
        "read-only",
        "kernel's",
        "long name",
        "NUL",
    ],
)
@pytest.mark.parametrize("use", [probe_folder, make_and_lock], ids=["probe", "lock"])
def test_a_folder_that_cannot_be_written_is_reported_with_the_reason(
    tmp_path: Path, make: Callable[[Path], Path], problem: str, advice: str, use: Callable[[Path], None]
) -> None:
    """Promise A5."""
    folder = make(tmp_path)
    with pytest.raises(ResourceError) as raised:
        use(folder)
    message = str(raised.value)
    assert message.startswith(f"{str(folder).replace(chr(0), chr(92) + '0')}: cannot be written to: ")
    assert problem.format(tmp_path) in message and message.endswith(advice) and "\n" not in message


def test_the_option_that_chose_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"Choose another data\.cache_dir\.$"):
        probe_folder(a_file(tmp_path), "data.cache_dir")


def test_a_folder_that_vanished_is_reported_at_the_next_write(tmp_path: Path) -> None:
    """Promise A5."""
    with pytest.raises(ResourceError, match=r"gone/file: was not saved: the folder .*gone does not exist"):
        write_atomically(tmp_path / "gone" / "file", b"text")


def test_every_operation_of_the_seam_can_be_watched() -> None:
    seen: list[str] = []
    disk = WatchedIo(lambda _, name, __: seen.append(name))
    assert disk.free_bytes(Path()) > 0 and disk.listdir(Path(__file__).parent)
    assert seen == ["free_bytes", "listdir"]
