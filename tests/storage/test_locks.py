"""One run at a time in a run folder, and only its maker removes it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from io_faults import exit_code_in_a_fork, write_temporary

from smollm2.errors import ResourceError
from smollm2.storage.locks import is_held, lock_folder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def test_a_folder_is_held_while_its_process_is_running(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with lock_folder(tmp_path):
        assert is_held(tmp_path)
    holder = json.loads((tmp_path / ".lock").read_bytes())
    assert is_held(tmp_path)  # released, but this process, which was the last holder, is running
    for changed in ({"boot_id": "another boot"}, {"pid": 2**22 + 1}, {"pid": "none"}, {"process_started": 1e9}):
        (tmp_path / ".lock").write_text(json.dumps({**holder, **changed}))
        assert not is_held(tmp_path)


def test_a_held_folder_refuses_a_second_run_and_names_the_first(tmp_path: Path) -> None:
    """Promise A9."""
    expected = rf"^{tmp_path}: is in use by another run \(process {os.getpid()} on {socket.gethostname()}, since "
    with lock_folder(tmp_path) as held:
        assert held.is_exclusive
        with pytest.raises(ResourceError, match=expected), lock_folder(tmp_path):
            pytest.fail("two runs hold one folder")


def test_a_released_folder_can_be_held_again(tmp_path: Path) -> None:
    for _ in range(3):
        with lock_folder(tmp_path):
            holder = json.loads((tmp_path / ".lock").read_bytes())
    assert set(holder) == {"pid", "host", "boot_id", "process_started", "started"}


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
            with lock_folder(tmp_path) as held:
                os.kill(child, 0)
                assert held.is_exclusive
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
    with pytest.raises(ResourceError, match="lock: is a symbolic link"), lock_folder(tmp_path):
        pytest.fail("a link was taken for the lock")
    assert target.read_text() == "text"


@needs_fork
def test_the_lock_removes_the_temporary_files_of_killed_runs_and_no_others(tmp_path: Path) -> None:
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
def test_a_refused_run_removes_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with lock_folder(tmp_path):
        dead = write_temporary(tmp_path, child)
        with pytest.raises(ResourceError), lock_folder(tmp_path):
            pytest.fail("two runs hold one folder")
        assert dead.exists()


def test_a_discarded_folder_is_removed_with_the_parents_that_were_made_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "b"
    with lock_folder(folder) as held:
        (folder / "step_0001.pt").touch()
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").touch()
        held.discard()
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_before_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with lock_folder(tmp_path) as held:
        held.discard()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes"}


def test_a_run_that_is_refused_leaves_the_folder_of_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock_folder(folder):
        (folder / "metrics.jsonl").touch()
        with pytest.raises(ResourceError), lock_folder(folder) as second:
            second.discard()
        assert (folder / "metrics.jsonl").exists()
    assert folder.exists()


def test_a_folder_that_cannot_be_written_is_removed_again_if_it_is_new(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises((ResourceError, OSError)), lock_folder(tmp_path / "run"):
            pytest.fail("nothing can be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


CONTEND = """
import os, sys
from pathlib import Path
from smollm2.errors import ResourceError
from smollm2.storage.locks import lock_folder
folder, taken = Path(sys.argv[1]), 0
while taken < 100:
    try:
        with lock_folder(folder) as held:
            os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))  # fails if another run has the folder too
            taken += 1
            if taken % 2:
                held.discard()
            os.unlink(folder / "mine")
    except ResourceError as error:
        assert "in use" in str(error), error
"""


def test_two_processes_that_make_and_discard_one_folder_never_hold_it_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTEND, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
