"""The console, which shows a run as it trains, and run.log, which records the details.

On a terminal, a progress bar has the latest metrics below it; reports, samples and messages scroll above it. Elsewhere,
each report is one plain line without control characters, printed without rich, which would wrap and truncate it at 80
columns. Only rank 0 shows a console; every rank may have a log.
"""

import contextlib
import datetime
import math
import os
import re
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from smollm2.formatting import format_bytes, format_estimate
from smollm2.storage.run_folder import RUN_LOG
from smollm2.tracking.base import Event, Message, Metrics, Sample, Samples, Tracker, escape_controls

FORMATS = {
    "loss": "{:.4f}",
    "smoothed_loss": "{:.4f}",
    "validation_loss": "{:.4f}",
    "validation_bpb": "{:.4f}",
    "regression_bpb": "{:.4f}",
    "learning_rate": "{:.2e}",
    "grad_norm": "{:.3f}",
    "tokens_per_second": "{:.0f}",
}
"""The metrics that the console shows, in this order, and their formats; metrics.jsonl has all metrics."""

SCROLLED = ("loss", "validation_loss", "validation_bpb", "regression_bpb")
"""The metrics in the scrolling reports of a terminal, which may have only 80 columns; the latest value of every metric
in FORMATS is shown below the bar."""

SMOOTHING = 0.9
"""The weight of past values in smoothed_loss, an exponential moving average over about ten reports."""

SECONDS_BETWEEN_DRAWINGS = 0.1
SECONDS_BETWEEN_FRACTIONS = 2.0

SECRET_NAME = r"\w*_(?:KEY|TOKEN)|(?i:\w*(?:secret|password|api_?key|auth_token|access_token)\w*)"
SECRET_VALUE = re.compile(rf"\b({SECRET_NAME})(\b[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;)}}\]]+)")
URL_CREDENTIALS = re.compile(r"\b(\w+://)[^/\s@]+@")


class ConsoleTracker(Tracker):
    """Shows one run. If its stream is closed (a broken pipe), it stops printing and the run continues."""

    def __init__(
        self, train_steps: int, start_step: int, stream: TextIO | None = None, log: "RunLog | None" = None
    ) -> None:
        """`log` receives a copy of every message and page."""
        self.run_log = log
        self.train_steps = train_steps
        self.stream = stream or sys.stdout
        # Markup, highlighting and emoji are off: "[/bold]" and ":smile:" in a sample are text. Only the stream decides
        # whether it is a terminal: rich would follow FORCE_COLOR and send control characters into a pipe.
        self.is_terminal = self.stream.isatty()
        self.console = Console(
            file=self.stream, force_terminal=self.is_terminal, highlight=False, markup=False, emoji=False
        )
        self.is_terminal = self.is_terminal and not self.console.is_dumb_terminal
        self.is_silent = False
        # Messages also come from the threads of trackers in a `Fence`.
        self.lock = threading.RLock()
        self.live: Live | None = None
        self.bar = ProgressBar(total=train_steps, completed=start_step)
        self.latest: dict[str, float | int] = {}
        self.smoothed, self.smoothed_weight = 0.0, 0.0
        self.first_report: tuple[int, float] | None = None
        self.last_fraction = ("", 0.0, 0.0)
        self.drawn = -math.inf  # when progress was last drawn
        self.begun = ("", 0.0, 0.0)  # label, fraction and time at which the shown work began

    def on(self, message: Message) -> None:
        """Show metrics, samples and the text of events."""
        match message.content:
            case Metrics(values):
                self._show_metrics(values, message.step)
            case Samples(samples):
                for sample in samples:
                    self._show_sample(sample, message.step)
            case Event(_, text) if text:
                self.report(text)

    def report(self, message: str) -> None:
        """Show a message to the user; it may have several lines."""
        if self.run_log:
            self.run_log.write(message)
        self._write(escape_controls(message))

    def show_page(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show a start or end page: a title, then aligned names and values."""
        margin = max((len(name) for name, _ in rows), default=0) + 4
        lines = [title, *(f"  {name:<{margin - 4}}  {value}" for name, value in rows)]
        if self.run_log:
            self.run_log.write("\n".join(lines))
        lines = [escape_controls(line, keep_newlines=False) for line in lines]
        if self.is_terminal:
            lines = [wrap_words(line, self.console.width, margin) for line in lines]
        self._write("\n".join(lines))

    def show_progress(self, label: str, fraction: float, size: int = 0) -> None:
        """Show the progress of work before the first step; of work on `size` bytes, also the rate and the time left.

        On a terminal it is shown in place. Elsewhere a line is printed after each further 10 %, at most every 2 s, and
        at the end.
        """
        now = time.monotonic()
        if self.begun[0] != label or fraction < self.begun[1]:
            self.begun = (label, fraction, now)
        text = (
            f"{escape_controls(label, keep_newlines=False)} {fraction:.0%}{describe_pace(self.begun, fraction, size)}"
        )
        text = self._encodable(text)
        if self.is_terminal:
            if fraction < 1 and now - self.drawn < SECONDS_BETWEEN_DRAWINGS:
                return
            self.drawn = now
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(1.0, fraction, 24), text)
            self._draw(bar if fraction < 1 else None)
            return
        if self.last_fraction[0] != label:
            self.last_fraction = (label, 0.0, now)
        _, last, when = self.last_fraction
        if fraction >= 1 > last or (fraction - last >= 0.1 and now - when >= SECONDS_BETWEEN_FRACTIONS):
            self.last_fraction = (label, fraction, now)
            self._write(text)

    def restore_smoothing(self, losses: Iterable[float]) -> None:
        """Rebuild smoothed_loss from the losses reported before a resume."""
        for loss in losses:
            self._smooth(loss)

    def close(self) -> None:
        """Remove the progress bar; messages and pages can still be shown."""
        self._draw(None)

    def _show_metrics(self, metrics: Mapping[str, float | int], step: int) -> None:
        shown = {name: value for name, value in metrics.items() if name.partition("/")[0] in FORMATS}
        if "loss" in shown:
            shown["smoothed_loss"] = self._smooth(shown["loss"])
        self.latest |= shown
        name, left = f"step {step}/{self.train_steps}", self._time_left(step)
        if not self.is_terminal:
            self._write("  ".join([name, *format_metrics(shown)]) + left)
            return
        self._write(
            "  ".join([name, *format_metrics({key: shown[key] for key in shown if key.partition("/")[0] in SCROLLED})])
        )
        self.bar.update(step)
        top = Table.grid(expand=True, padding=(0, 2, 0, 0))
        top.add_row(Text(name + left, no_wrap=True), self.bar)
        below = join_in_lines(format_metrics(self.latest), self.console.width)
        self._draw(Group(top, *(Text(line, no_wrap=True) for line in below)))

    def _show_sample(self, sample: Sample, step: int) -> None:
        """Show a sample with its prompt in brackets: with line breaks on a terminal, on one line elsewhere."""
        text = escape_controls(f"[{sample.prompt}]{sample.text}", keep_newlines=self.is_terminal)
        self._write(f"step {step}/{self.train_steps}  sample: {text}")

    def _smooth(self, loss: float) -> float:
        """Return the exponential moving average of the losses so far, bias-corrected; only finite losses count."""
        if math.isfinite(loss):
            self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
            self.smoothed_weight = SMOOTHING * self.smoothed_weight + (1 - SMOOTHING)
        return self.smoothed / self.smoothed_weight if self.smoothed_weight else loss

    def _time_left(self, step: int) -> str:
        """Return the remaining time at the average speed since the first report; empty if there is only one report."""
        now = time.monotonic()
        self.first_report = self.first_report or (step, now)
        first_step, then = self.first_report
        if step <= first_step:
            return ""
        seconds = (now - then) / (step - first_step) * max(0, self.train_steps - step)
        # Clock format, not format_duration: next to a bar, the width must stay constant.
        return f"  time_left {datetime.timedelta(seconds=round(seconds))}"

    def _encodable(self, text: str) -> str:
        """Escape characters that the stream's encoding cannot represent."""
        encoding = self.stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _write(self, text: str) -> None:
        """Write lines that stay on the screen, above the progress bar if there is one."""
        text = self._encodable(text)
        if self.is_terminal:
            self._attempt(lambda: self._print_above(text))
        else:
            self._attempt(lambda: print(text, file=self.stream, flush=True))

    def _print_above(self, text: str) -> None:
        """Print above the bar, wrapped only at spaces: a path stays in one piece and can be copied."""
        lines = [wrap_words(line, self.console.width) for line in text.split("\n")]
        self.console.print(Text("\n".join(lines)), soft_wrap=True)
        if self.live is not None:  # rich cropped the bar like the text above it: redraw it
            self.live.refresh()

    def _draw(self, picture: Group | Table | None) -> None:
        """Keep `picture` below the scrolling lines; None removes it."""

        def draw() -> None:
            if self.live is None and picture is not None:
                # Drawn only when something changes, without rich's refresh thread and timer.
                self.live = Live(picture, console=self.console, auto_refresh=False, transient=True)
                self.live.start(refresh=True)
            elif self.live is not None and picture is not None:
                self.live.update(picture, refresh=True)
            elif self.live is not None:
                self.live.stop()
                self.live = None

        self._attempt(draw)

    def _attempt(self, draw: Callable[[], object]) -> None:
        """Call `draw`, from one thread at a time, unless the stream was closed."""
        with self.lock:
            if self.is_silent:
                return
            try:
                draw()
            except (OSError, ValueError):
                self.is_silent = True
                # Python flushes stdout at exit; a closed pipe would then turn the exit code into 120.
                with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


class RunLog:
    """run.log: every message with its time and rank, errors with their tracebacks; secrets are redacted.

    The file is opened for each message, and disk errors are ignored, so that none can end the run.
    """

    def __init__(self, folder: Path, rank: int, secrets: Sequence[str] = ()) -> None:
        self.path = folder / RUN_LOG
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


def describe_pace(begun: tuple[str, float, float], fraction: float, size: int) -> str:
    """Return the rate of work on `size` bytes and the time left, such as `, 8.2 MB/s, 12 seconds left`.

    `begun` has the fraction and the time (of time.monotonic) at which the work began. Return nothing in the first second.
    """
    seconds, done = time.monotonic() - begun[2], fraction - begun[1]
    if not size or seconds < 1 or done <= 0:
        return ""
    left = f", {format_estimate(seconds / done * (1 - fraction))} left" if fraction < 1 else ""
    return f", {format_bytes(done * size / seconds)}/s{left}"


def format_metrics(metrics: Mapping[str, float | int]) -> list[str]:
    """Return `loss 3.2100`, `grad_norm 0.912`, ... in the order of FORMATS, those of each source of a mixture too."""
    return [
        f"{name} {form.format(metrics[name])}"
        for known, form in FORMATS.items()
        for name in metrics
        if name.partition("/")[0] == known
    ]


def join_in_lines(parts: Sequence[str], width: int) -> list[str]:
    """Join the parts with two spaces into as few lines of `width` columns as possible; no part is split."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def wrap_words(line: str, width: int, indent: int = 0) -> str:
    """Break a line at spaces; the following lines are indented. A word that is longer than a line is not split."""
    return textwrap.fill(
        line, max(width, indent + 20), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def find_secrets(variables: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values, of at least 6 characters, of environment variables whose names mark them as secret."""
    return tuple(value for name, value in variables.items() if re.fullmatch(SECRET_NAME, name) and len(value) >= 6)


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """Return the text with `secrets`, the values in `NAME_KEY=value` and the credentials in URLs replaced by ***."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return URL_CREDENTIALS.sub(r"\1***@", SECRET_VALUE.sub(r"\1\2***", text))
