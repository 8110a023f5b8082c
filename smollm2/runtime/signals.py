"""Signals that ask a run to stop: the first is remembered until a safe moment, the second ends the process."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from smollm2.errors import Interrupted

SAME_SIGNAL_SECONDS = 2.0
"""Two signals within this many seconds count as one: a launcher forwards a signal that the terminal already sent to
every process."""


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1 until a safe moment; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number, self.received_at = 0, 0.0
        self.grace = SAME_SIGNAL_SECONDS if "LOCAL_RANK" in os.environ else 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self.received_at >= self.grace:
            os._exit(128 + number)
        if not self.number:
            self.number, self.received_at = number, time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block if this is the main thread; other threads keep the caller's handlers."""
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
        """Raise Interrupted if a signal was received; for use during work that has nothing to save."""
        if self.number:
            name = signal.Signals(self.number).name
            raise Interrupted(f"stopped by {name} before the first step; nothing was lost", self.number)
