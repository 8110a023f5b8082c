"""Whether a process is running."""

import os
import subprocess
import sys
import time

import pytest

from smollm2.storage.processes import is_running, start_time


def test_this_process_is_running_and_is_the_one_that_started_when_it_did() -> None:
    assert is_running(os.getpid())
    assert is_running(os.getpid(), start_time())


def test_a_process_with_the_number_of_an_earlier_one_is_another() -> None:
    assert not is_running(os.getpid(), start_time() - 3600)


@pytest.mark.parametrize("pid", [2**22 + 1, 2**31, 2**70, -1])
def test_a_number_that_no_process_has_is_not_running(pid: int) -> None:
    assert not is_running(pid)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
def test_a_process_that_ended_and_was_not_waited_for_is_not_running() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while is_running(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert child.wait() == 0
