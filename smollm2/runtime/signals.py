"""Signals that ask a run to stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from smollm2.errors import Interrupted

SAME_SIGNAL_SECONDS = 2.0
"""A launcher passes on what the terminal already sent to every process: within this time it is the same request."""


class StopSignal:
    """The first SIGINT, SIGTERM or SIGUSR1 is remembered until a safe moment; the second ends the process at once."""

    def __init__(self) -> None:
        self.number, self.came = 0, 0.0
        self.grace = SAME_SIGNAL_SECONDS if "LOCAL_RANK" in os.environ else 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self.came >= self.grace:
            os._exit(128 + number)
        if not self.number:
            self.number, self.came = number, time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block, in the main thread; elsewhere they stay the caller's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        before = {getattr(signal, name): signal.signal(getattr(signal, name), self._handle) for name in names}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_set(self) -> None:
        """For work that keeps nothing: raises Interrupted."""
        if self.number:
            name = signal.Signals(self.number).name
            raise Interrupted(f"stopped by {name} before the first step; nothing was lost", self.number)
