"""The tracker that writes report.html during the run, rarely enough to cost the run almost no time."""

import time
from pathlib import Path

from smollm2.report.page import write_page
from smollm2.report.reading import read_run
from smollm2.storage.run_folder import REPORT
from smollm2.tracking.base import Event, Message, Metrics, Tracker

SECONDS_BETWEEN_PAGES = 30.0
SHARE_OF_THE_RUN = 0.01
"""Largest fraction of the run spent on pages: after one that took 2 s, none is written for 200 s."""


class ReportTracker(Tracker):
    """Writes the page after validations and at the end, from the files of the run folder, on a thread of its own."""

    def __init__(self, folder: Path, seconds_between: float = SECONDS_BETWEEN_PAGES) -> None:
        self.folder, self.seconds_between = folder, seconds_between
        self.next_page = 0.0
        self.is_stale = False

    def on(self, message: Message) -> None:
        """Write the page after a validation if it is due; remember whether anything has changed since the last page."""
        match message.content:
            case Metrics(values):
                self.is_stale = True
                if "validation_loss" in values and time.monotonic() >= self.next_page:
                    self._write()
            case Event(kind) if kind in ("done", "stopped", "failed"):
                self.is_stale = True

    def close(self) -> None:
        """Write the final page, unless nothing has changed since the last one."""
        if self.is_stale:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        write_page([read_run(self.folder)], self.folder / REPORT)
        seconds = time.monotonic() - began
        self.next_page = began + max(self.seconds_between, seconds / SHARE_OF_THE_RUN)
        self.is_stale = False
