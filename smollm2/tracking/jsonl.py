"""The local truth: metrics, events, samples and diagnostics as .jsonl in the run folder, one JSON object a line.

Rows are only ever appended, each handed to the system before the call returns, so that a kill costs at most the end of
the last line. A resume at step N first removes what came after N and what is torn: the run then writes those rows again,
and none is missing or double. That holds where everything about step N is logged, and `sync` called, before step N's
checkpoint is written. A number that is not finite becomes null: JSON has no NaN, and readers make null into one.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path

from smollm2.errors import ResourceError
from smollm2.storage.atomic import write_atomically
from smollm2.tracking.base import Diagnosis, Landscape, Sample, Say, Tracker

FILES = ("metrics.jsonl", "events.jsonl", "samples.jsonl", "diagnostics.jsonl")

LINE_SEPARATORS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""JSON allows them raw, but Python's splitlines would cut a row there. Other letters stay readable."""


class JsonlTracker(Tracker):
    """Writes the four files of one run folder. A disk that is full holds rows back in memory and ends nothing."""

    def __init__(self, folder: Path, resumed_step: int, say: Say) -> None:
        """Repair the files of `folder` for a run that goes on after `resumed_step`; 0 is a new run and keeps nothing.

        Raises ResourceError where the folder cannot be written.
        """
        self.folder, self.say = folder, say
        try:
            for name in FILES:
                repair_rows(folder / name, resumed_step, say)
            # Unbuffered: what write() took is the system's, and survives a kill of this process.
            self.files = {name: FileIO(folder / name, "ab") for name in FILES}
        except OSError as error:
            raise ResourceError(
                f"{error.filename or folder} - {error.strerror or error} - the run's rows cannot be written there; "
                "free it or choose another --save_dir"
            ) from error
        self.unwritten = dict.fromkeys(FILES, b"")
        self.is_full = False

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """A row of metrics.jsonl."""
        self._append("metrics.jsonl", {"step": step, **metrics})

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """A row of samples.jsonl for each sample."""
        for sample in samples:
            self._append("samples.jsonl", {"step": step, "prompt": sample.prompt, "text": sample.text})

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """A row of events.jsonl, with the clock's time in seconds since 1970."""
        row = {"step": step, "kind": kind, "message": message, **details, "time": round(time.time(), 3)}
        self._append("events.jsonl", row)

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """A row of diagnostics.jsonl, to four significant digits, without the histograms."""
        row = dataclasses.asdict(dataclasses.replace(diagnosis, gradient_histograms={}, weight_histograms={}))
        del row["gradient_histograms"], row["weight_histograms"]
        self._append("diagnostics.jsonl", {"step": step, **round_numbers(row)})

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        """landscape.json, whole: the newest takes the place of the one before."""
        try:
            write_atomically(self.folder / "landscape.json", landscape_json(landscape, step))
        except (OSError, ResourceError) as error:
            self.say(f"landscape.json - {error} - the landscape of step {step} is not kept")

    def sync(self) -> None:
        """Onto the disk; call it before a checkpoint is written, or a power cut could leave the checkpoint ahead."""
        for name, file in self.files.items():
            try:
                self._write(name)
                os.fsync(file.fileno())
            except OSError as error:
                self._say_full(name, error)

    def close(self) -> None:
        """Write what was held back and close; what still has no room is counted."""
        self.sync()
        for file in self.files.values():
            file.close()
        if lost := sum(rows.count(b"\n") for rows in self.unwritten.values()):
            self.say(f"{lost} rows of the run folder were never written: its disk is full")

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        line = json.dumps(replace_nonfinite(row), ensure_ascii=False, allow_nan=False, default=str)
        line = line.translate(LINE_SEPARATORS)
        # UTF-8 has no lone surrogates; "backslashreplace" writes them as the JSON escapes that they also are.
        self.unwritten[name] += line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._write(name)
        except OSError as error:
            self._say_full(name, error)

    def _write(self, name: str) -> None:
        """All that waits for this file. A disk that fills in the middle of a row is given the rest of it later."""
        while self.unwritten[name]:
            written = self.files[name].write(self.unwritten[name])
            self.unwritten[name] = self.unwritten[name][written:]
        self.is_full = False

    def _say_full(self, name: str, error: OSError) -> None:
        """One line when it begins, not one a row."""
        if not self.is_full:
            self.is_full = True
            self.say(
                f"{name} - {error.strerror or error} - rows wait in memory until it can be written; free some space"
            )


def landscape_json(landscape: Landscape, step: int) -> bytes:
    """What landscape.json holds: the fields of Landscape, and the step of its weights."""
    row = replace_nonfinite({"step": step, **dataclasses.asdict(landscape)})
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def round_numbers(row: Mapping[str, object]) -> dict[str, object]:
    """Each number of nested mappings to four significant digits: a file of many rows that nobody computes with."""
    return {
        key: round_numbers(value) if isinstance(value, Mapping) else float(f"{value:.4g}") for key, value in row.items()
    }


def replace_nonfinite(value: object) -> object:
    """The same JSON value with null for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): replace_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(entry) for entry in value]
    return value


def repair_rows(path: Path, last_step: int, say: Say) -> None:
    """Keep the rows of a file up to `last_step`; all at once or not at all.

    A torn last line goes without a word: its row is written again. Lines in the middle that are no rows are moved to a
    file beside it and counted.
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
        aside = path.with_name(path.name + ".damaged")
        with aside.open("ab") as file:
            file.write(b"".join(line + b"\n" for _, line in damaged))
        say(f"{path.name}:{damaged[0][0]} - {len(damaged)} lines are not rows - they are kept in {aside.name}")
    if torn or len(kept) < len(lines):
        write_atomically(path, b"".join(line + b"\n" for line in kept))


def read_step(line: bytes) -> int | None:
    """The step of a row; None where the line is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
