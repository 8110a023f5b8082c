"""report.html while the run goes on: written anew from the run folder, seldom enough to cost the run nothing."""

import time
from collections.abc import Mapping
from pathlib import Path

from smollm2.report.page import write_page
from smollm2.report.reading import read_run
from smollm2.tracking.base import Tracker

SECONDS_BETWEEN_PAGES = 30.0
SHARE_OF_THE_RUN = 0.01
"""A page that took two seconds is not written again for 200."""

FILE = "report.html"


class ReportTracker(Tracker):
    """Writes the page at evaluations and at the end. It stands behind a fence: its thread reads what the rows' file has."""

    def __init__(self, folder: Path, seconds_between: float = SECONDS_BETWEEN_PAGES) -> None:
        self.folder, self.seconds_between = folder, seconds_between
        self.next_page = 0.0
        self.is_stale = False

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """A validation is news that is worth a page."""
        self.is_stale = True
        if "validation_loss" in metrics and time.monotonic() >= self.next_page:
            self._write()

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """How the run ended stands in its last page."""
        self.is_stale = self.is_stale or kind in ("done", "stopped", "failed")

    def close(self) -> None:
        """The page of the whole run, where there is anything new."""
        if self.is_stale:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        write_page([read_run(self.folder)], self.folder / FILE)
        taken = time.monotonic() - began
        self.next_page = began + max(self.seconds_between, taken / SHARE_OF_THE_RUN)
        self.is_stale = False
