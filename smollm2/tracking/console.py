"""What a person sees while a run goes on, and run.log, which holds the detail.

On a terminal: a bar and the latest numbers below, reports, samples and messages scrolling above. Elsewhere rich would
wrap and truncate at 80 columns, so there it is one plain line per report, without control characters. Only rank 0 has
a console; every rank may have a log. This file and cli.py alone print.
"""

import contextlib
import datetime
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from smollm2.tracking.base import Sample, Tracker, escape_controls

FORMATS = {
    "loss": "{:.4f}",
    "smoothed_loss": "{:.4f}",
    "validation_loss": "{:.4f}",
    "validation_bpb": "{:.4f}",
    "learning_rate": "{:.2e}",
    "grad_norm": "{:.3f}",
    "tokens_per_second": "{:.0f}",
}
"""The metrics that a person is shown, in order; metrics.jsonl holds the others too."""

SCROLLED = ("loss", "validation_loss", "validation_bpb")
"""Those in a scrolling report of a terminal, which has room for 80 columns; all stand below its bar."""

SMOOTHING = 0.9
"""Weight of the past in smoothed_loss: a mean over about ten reports. It starts afresh after a resume."""

SECONDS_BETWEEN_FRACTIONS = 2.0

SECRET_NAME = r"\w*_(?:KEY|TOKEN)|(?i:\w*(?:secret|password|api_?key|auth_token|access_token)\w*)"
SECRET_VALUE = re.compile(rf"\b({SECRET_NAME})(\b[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;)}}\]]+)")
URL_CREDENTIALS = re.compile(r"\b(\w+://)[^/\s@]+@")


class ConsoleTracker(Tracker):
    """Shows one run. A stream that nobody reads any more (a closed pipe) silences it and ends nothing."""

    def __init__(
        self, train_steps: int, start_step: int, stream: TextIO | None = None, log: "RunLog | None" = None
    ) -> None:
        """`log` gets a copy of every message and page."""
        self.run_log = log
        self.train_steps = train_steps
        self.stream = stream or sys.stdout
        # Markup, highlighting and emoji off: "[/bold]" and ":smile:" in a sample are text. The stream alone decides what
        # it is: rich would follow FORCE_COLOR and send control characters into a pipe.
        self.is_terminal = self.stream.isatty()
        self.console = Console(
            file=self.stream, force_terminal=self.is_terminal, highlight=False, markup=False, emoji=False
        )
        self.is_terminal = self.is_terminal and not self.console.is_dumb_terminal
        self.is_silent = False
        # Messages also come from the threads of fenced trackers.
        self.lock = threading.RLock()
        self.live: Live | None = None
        self.bar = ProgressBar(total=train_steps, completed=start_step)
        self.latest: dict[str, float | int] = {}
        self.smoothed, self.smoothed_weight = 0.0, 0.0
        self.first_report: tuple[int, float] | None = None
        self.last_fraction = ("", 0.0, 0.0)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """One report or one validation, as one line."""
        shown = {name: metrics[name] for name in FORMATS if name in metrics}
        if "loss" in shown:
            shown["smoothed_loss"] = self._smooth(shown["loss"])
        self.latest |= shown
        name, left = f"step {step}/{self.train_steps}", self._time_left(step)
        if not self.is_terminal:
            self._write(name + format_metrics(shown) + left)
            return
        self._write(name + format_metrics({key: shown[key] for key in SCROLLED if key in shown}))
        self.bar.update(step)
        top = Table.grid(expand=True, padding=(0, 2, 0, 0))
        top.add_row(Text(name + left, no_wrap=True), self.bar)
        self._show(Group(top, Text(format_metrics(self.latest).strip())))

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """Each sample, its prompt in brackets; with its line breaks on a terminal, on one line elsewhere."""
        for sample in samples:
            text = escape_controls(f"[{sample.prompt}]{sample.text}", keep_newlines=self.is_terminal)
            self._write(f"step {step}/{self.train_steps}  sample: {text}")

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """The message, where it has one; `details` are for events.jsonl."""
        if message:
            self.say(message)

    def say(self, message: str) -> None:
        """Put a message before the user; it may have several lines."""
        if self.run_log:
            self.run_log.write(message)
        self._write(escape_controls(message))

    def show_page(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A start or end page: a title, then aligned names and values."""
        width = max((len(name) for name, _ in rows), default=0)
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        if self.run_log:
            self.run_log.write("\n".join(lines))
        self._write("\n".join(escape_controls(line, keep_newlines=False) for line in lines))

    def show_progress(self, label: str, fraction: float) -> None:
        """How far work before the first step is: in place on a terminal; elsewhere a line per tenth, seldom, and the end."""
        text = f"{escape_controls(label, keep_newlines=False)} {fraction:.0%}"
        if self.is_terminal:
            self._show(Text(text) if fraction < 1 else None)
            return
        now = time.monotonic()
        if self.last_fraction[0] != label:
            self.last_fraction = (label, 0.0, now)
        _, last, when = self.last_fraction
        if fraction >= 1 > last or (fraction - last >= 0.1 and now - when >= SECONDS_BETWEEN_FRACTIONS):
            self.last_fraction = (label, fraction, now)
            self._write(text)

    def close(self) -> None:
        """Take the bar down; messages and pages can still be shown."""
        self._show(None)

    def _smooth(self, loss: float) -> float:
        """The exponential mean of the losses so far, without the bias of its start; one that is not finite is left out."""
        if math.isfinite(loss):
            self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
            self.smoothed_weight = SMOOTHING * self.smoothed_weight + (1 - SMOOTHING)
        return self.smoothed / self.smoothed_weight if self.smoothed_weight else loss

    def _time_left(self, step: int) -> str:
        """At the pace since the first report, everything included; empty before there is one."""
        now = time.monotonic()
        self.first_report = self.first_report or (step, now)
        first_step, then = self.first_report
        if step <= first_step:
            return ""
        seconds = (now - then) / (step - first_step) * max(0, self.train_steps - step)
        return f"  time_left {datetime.timedelta(seconds=round(seconds))}"

    def _write(self, text: str) -> None:
        """Lines that stay. What the stream's encoding lacks is written as its escape."""
        encoding = self.stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self.is_terminal:
            self._attempt(lambda: self._print_above(Text(text)))
        else:
            self._attempt(lambda: print(text, file=self.stream, flush=True))

    def _print_above(self, text: Text) -> None:
        """Unbroken lines, so that a path can be copied; the picture is drawn once more, since rich crops it by their rule."""
        self.console.print(text, soft_wrap=True)
        if self.live is not None:
            self.live.refresh()

    def _show(self, picture: Group | Text | None) -> None:
        """Keep `picture` below the lines that scroll; None takes it down."""

        def draw() -> None:
            if self.live is None and picture is not None:
                # Drawn when there is news: no thread of rich's own, no clock.
                self.live = Live(picture, console=self.console, auto_refresh=False, transient=True)
                self.live.start(refresh=True)
            elif self.live is not None and picture is not None:
                self.live.update(picture, refresh=True)
            elif self.live is not None:
                self.live.stop()
                self.live = None

        self._attempt(draw)

    def _attempt(self, draw: Callable[[], object]) -> None:
        """One writer at a time, and none once the reader has gone."""
        with self.lock:
            if self.is_silent:
                return
            try:
                draw()
            except (OSError, ValueError):
                self.is_silent = True
                # Python flushes stdout when it ends, and would turn the exit code into 120 over a closed pipe.
                with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


class RunLog:
    """run.log: every message with its time and rank, errors with their traceback, secrets left out.

    Opened for each message, so that nothing is held and no disk trouble can reach the run.
    """

    def __init__(self, folder: Path, rank: int, secrets: Sequence[str] = ()) -> None:
        self.path = folder / "run.log"
        self.rank = rank
        self.secrets = tuple(secrets)

    def write(self, message: str) -> None:
        """Append a message, which may have several lines."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = f"{now} rank {self.rank}  {escape_controls(redact(message, self.secrets))}\n"
        with contextlib.suppress(OSError), self.path.open("ab", buffering=0) as file:
            file.write(line.encode("utf-8"))

    def write_error(self, error: BaseException) -> None:
        """Append an error with its traceback and its causes."""
        self.write("".join(traceback.format_exception(error)).rstrip())


def format_metrics(metrics: Mapping[str, float | int]) -> str:
    """`  loss 3.2100  grad_norm 0.912`, in the order of FORMATS."""
    return "".join(f"  {name} {form.format(metrics[name])}" for name, form in FORMATS.items() if name in metrics)


def find_secrets(variables: Mapping[str, str]) -> tuple[str, ...]:
    """The values of environment variables whose names say that they are secret; shorter than 6 characters is none."""
    return tuple(value for name, value in variables.items() if re.fullmatch(SECRET_NAME, name) and len(value) >= 6)


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """The text with `secrets`, `NAME_KEY=value` and the credentials of URLs replaced by ***."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return URL_CREDENTIALS.sub(r"\1***@", SECRET_VALUE.sub(r"\1\2***", text))
