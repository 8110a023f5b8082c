"""Signals are remembered until a safe moment."""

import os
import signal

import pytest

from smollm2.errors import Interrupted
from smollm2.runtime.signals import StopSignal


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_remembered_and_raised_where_asked(name: str) -> None:
    stop = StopSignal()
    number = getattr(signal, name)
    with stop.listening():
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=name) as raised:
            stop.raise_if_set()
    assert raised.value.exit_code == 128 + number


def test_the_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with StopSignal().listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_the_handlers_of_the_caller_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
