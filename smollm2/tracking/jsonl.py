"""The record of a run: metrics, events, samples and diagnostics as .jsonl files, with one JSON object per line.

Rows are only appended, and each is passed to the operating system before the call returns, so a killed run loses at
most the end of the last line. A resume at step N first removes the rows after step N and a truncated last line. The run
then writes these rows again, so none is missing or duplicated. This requires that everything about step N is logged,
and `sync` called, before step N's checkpoint is written. A number that is not finite becomes null, because JSON has no
NaN.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

from smollm2.errors import ResourceError, lay_out
from smollm2.storage.atomic import write_atomically
from smollm2.storage.run_folder import DIAGNOSTICS, EVENTS, LANDSCAPE, METRICS, SAMPLES
from smollm2.tracking.base import Diagnosis, Event, Landscape, Message, Metrics, Report, Samples, Tracker

FILES = (METRICS, EVENTS, SAMPLES, DIAGNOSTICS)

LINE_SEPARATORS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Escapes for the line separators that JSON allows unescaped: Python's splitlines would split a row at them. Other
characters stay readable."""


class JsonlTracker(Tracker):
    """Writes the files of one run folder. If the disk is full, rows are kept in memory and the run continues."""

    def __init__(self, folder: Path, resumed_step: int, report: Report) -> None:
        """Repair the files in `folder` for a run that resumes after `resumed_step`; if that is 0, the run is new, and
        no rows are kept. Raise ResourceError if the folder cannot be written to."""
        self.folder, self.report = folder, report
        try:
            for name in FILES:
                repair_rows(folder / name, resumed_step, report)
            self.files = open_rows(folder)
        except OSError as error:
            raise ResourceError(
                error.filename or folder,
                f"cannot be written ({error.strerror or error})",
                "make it writable, or choose another --save_dir",
            ) from error
        self.unwritten = dict.fromkeys(FILES, b"")
        self.is_full = False

    def on(self, message: Message) -> None:
        """Append the message's rows to the file for its kind; a landscape replaces the previous one."""
        step = message.step
        match message.content:
            case Metrics(values):
                self._append(METRICS, {"step": step, **values})
            case Samples(samples):
                for sample in samples:
                    self._append(SAMPLES, {"step": step, "prompt": sample.prompt, "text": sample.text})
            case Event(kind, text, details):
                row = {"step": step, "kind": kind, "message": text, **details, "time": round(time.time(), 3)}
                self._append(EVENTS, row)
            case Diagnosis() as diagnosis:
                self._append(DIAGNOSTICS, {"step": step, **diagnosis_row(diagnosis)})
            case Landscape() as landscape:
                try:
                    write_atomically(self.folder / LANDSCAPE, landscape_json(landscape, step))
                except (OSError, ResourceError) as error:
                    self.report(lay_out(LANDSCAPE, f"the landscape of step {step} could not be written ({error})"))

    def sync(self) -> None:
        """Flush all rows to disk.

        Call this before writing a checkpoint, or a power cut could leave a checkpoint without its rows.
        """
        for name, file in self.files.items():
            try:
                self._write(name)
                os.fsync(file.fileno())
            except OSError as error:
                self._report_full(name, error)

    def rewind(self, step: int) -> None:
        """Remove the rows after `step`, as a resume does; if the disk is full, they stay, and this is reported."""
        self.sync()
        for name in FILES:
            try:
                repair_rows(self.folder / name, step, self.report)
            except ResourceError as error:
                self.report(str(error))
        old, self.files = self.files, open_rows(self.folder)
        for file in old.values():
            file.close()

    def close(self) -> None:
        """Write the rows that are still in memory and close the files; report how many rows could not be written."""
        self.sync()
        for file in self.files.values():
            file.close()
        if lost := sum(rows.count(b"\n") for rows in self.unwritten.values()):
            self.report(f"{self.folder}: {lost} rows were never written, the disk is full.")

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        line = json.dumps(replace_nonfinite(row), ensure_ascii=False, allow_nan=False, default=str)
        line = line.translate(LINE_SEPARATORS)
        # UTF-8 cannot encode lone surrogates; "backslashreplace" writes them as escapes that are also valid JSON.
        self.unwritten[name] += line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._write(name)
        except OSError as error:
            self._report_full(name, error)

    def _write(self, name: str) -> None:
        """Write a file's rows that are still in memory.

        If the disk fills up in the middle of a row, the rest is written later.
        """
        while self.unwritten[name]:
            written = self.files[name].write(self.unwritten[name])
            self.unwritten[name] = self.unwritten[name][written:]
        self.is_full = False

    def _report_full(self, name: str, error: OSError) -> None:
        """Report a full disk once, when it begins, and not for each row."""
        if not self.is_full:
            self.is_full = True
            self.report(
                lay_out(
                    name,
                    f"cannot be written ({error.strerror or error}); its rows are kept in memory",
                    "free some disk space",
                )
            )


def open_rows(folder: Path) -> dict[str, FileIO]:
    """Open the files for appending, unbuffered: what write() accepts is passed to the operating system and survives a
    kill of this process."""
    return {name: FileIO(folder / name, "ab") for name in FILES}


def diagnosis_row(diagnosis: Diagnosis) -> dict[str, object]:
    """Return the fields of a diagnosis, without the histograms, rounded to four significant digits."""
    row = dataclasses.asdict(dataclasses.replace(diagnosis, gradient_histograms={}, weight_histograms={}))
    del row["gradient_histograms"], row["weight_histograms"]
    return round_numbers(row)


def landscape_json(landscape: Landscape, step: int) -> bytes:
    """Return the content of landscape.json: the fields of `Landscape`, and the step at which it was measured."""
    row = replace_nonfinite({"step": step, **dataclasses.asdict(landscape)})
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def round_numbers(row: Mapping[str, object]) -> dict[str, object]:
    """Round all numbers in nested mappings to four significant digits, to keep the file small."""
    return {
        key: round_numbers(value) if isinstance(value, Mapping) else float(f"{value:.4g}") for key, value in row.items()
    }


def replace_nonfinite(value: object) -> object:
    """Return a JSON value with every NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): replace_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(entry) for entry in value]
    return value


def repair_rows(path: Path, last_step: int, report: Report) -> None:
    """Rewrite a file atomically so that only the rows up to `last_step` remain.

    A truncated last line is dropped silently, because its row is written again. Damaged lines before it are moved to a
    file next to it, and their number is reported.
    """
    if not path.exists():
        return
    kept, damaged = [], []
    *lines, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        step = read_step(line)
        if step is None:
            damaged.append((number, line))
        elif step <= last_step and last_step > 0:
            kept.append(line)
    if damaged:
        moved = path.with_name(path.name + ".damaged")
        with moved.open("ab") as file:
            file.write(b"".join(line + b"\n" for _, line in damaged))
        report(f"{path.name}:{damaged[0][0]}: {len(damaged)} damaged lines were moved to {moved.name}")
    if torn or len(kept) < len(lines):
        write_atomically(path, b"".join(line + b"\n" for line in kept))


def read_values(path: Path, name: str) -> list[float]:
    """Return the values of one metric in the rows of a file; null values and damaged lines are skipped."""
    values = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            value = json.loads(line).get(name)
            values += [float(value)] if isinstance(value, int | float) else []
    return values


def read_step(line: bytes) -> int | None:
    """Return the step of a row, or None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
