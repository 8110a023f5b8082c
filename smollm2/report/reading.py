"""Read a run folder without trusting its files.

A file may be missing, truncated, damaged or written by another program: its usable parts are read, the rest is reported
in `problems`, and no error is raised. Metrics are stored in columns of 8 bytes per number, 8 MB for 100,000 rows.
"""

import math
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from smollm2.errors import DataError, lay_out
from smollm2.report.checks import Checks, read_checks
from smollm2.report.json_files import Row, is_step, read_object, read_rows, to_list, to_number, to_numbers, to_text
from smollm2.report.sources import SourceStatistics, read_sources
from smollm2.storage.locks import is_held
from smollm2.storage.run_folder import (
    BEST,
    CONFIG,
    DATA,
    DIAGNOSTICS,
    DOCTOR,
    EVENT,
    EVENT_FOLDERS,
    EVENTS,
    LANDSCAPE,
    METRICS,
    SAMPLES,
    count_checkpoint_bytes,
    is_checkpoint,
    step_of,
)
from smollm2.tracking.base import Diagnosis, Landscape

COLUMNS = (
    "step",
    "tokens",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "skipped",
    "tokens_per_second",
    "validation_loss",
    "validation_bpb",
    "regression_loss",
    "regression_bpb",
)
"""The columns of metrics.jsonl that a page shows."""

BY_SOURCE = ("validation_loss/", "validation_bpb/")
"""What the columns of the sources of a mixture begin with; the name of the source follows."""

MOST_COLUMNS = 150
MOST_AUTOPSIES = 100

CONFIG_BYTES = 2**20
LIFE = ("start", "stopped", "failed", "done")
"""The kinds of events that determine the status of a run."""


@dataclass(frozen=True)
class Setting:
    """One value of config.yaml as written in the file; `origin` is empty if the value is the default."""

    value: str
    origin: str

    @property
    def is_default(self) -> bool:
        """Return whether the value is the default or derived from another value, instead of set explicitly."""
        return self.origin in ("", "default") or self.origin.startswith("from ")


@dataclass(frozen=True)
class RunFolder:
    """Everything that could be read from a run folder. Metrics are columns of equal length; a missing value is NaN."""

    path: Path
    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict.fromkeys(COLUMNS, ()))
    events: Sequence[Row] = ()
    samples: Sequence[Row] = ()
    diagnoses: Sequence[tuple[int, Diagnosis]] = ()
    landscape: tuple[int, Landscape] | None = None
    sources: Sequence[SourceStatistics] = ()
    checks: Checks | None = None
    best: Row | None = None
    checkpoints: Sequence[tuple[int, Path, int]] = ()
    problems: Sequence[str] = ()
    is_held: bool = False

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) for each row that has the metric."""
        pairs = zip(self.metrics["step"], self.metrics[name], strict=True)
        return [(int(step), value) for step, value in pairs if not math.isnan(value)]

    def number(self, key: str) -> float | None:
        """Return a setting as a number, or None if it is absent or not a number."""
        setting = self.settings.get(key)
        return parse_number(setting.value) if setting else None

    def latest(self, *kinds: str) -> Row | None:
        """Return the last event of these kinds, or None."""
        return next((event for event in reversed(self.events) if event["kind"] in kinds), None)

    @property
    def train_steps(self) -> int | None:
        """Return the number of steps in the whole run, according to its config."""
        steps = self.number("training.train_steps")
        return int(steps) if steps is not None else None

    @property
    def last_step(self) -> int:
        """Return the last step that was reported; 0 if there is none yet."""
        return int(max(self.metrics["step"], default=0))


def read_run(path: Path) -> RunFolder:
    """Read everything that a page shows. Raise DataError if the folder is not a run folder."""
    if not (path / METRICS).exists() and not (path / CONFIG).exists():
        what = f"has neither {METRICS} nor {CONFIG}" if path.is_dir() else "is not a folder"
        raise DataError(path, what, "specify the --save_dir of a run")
    problems: list[str] = []
    events = read_rows(path / EVENTS, problems, parse_event)
    events += read_autopsies(path, {event["step"] for event in events if event["kind"] == "autopsy"}, problems)
    return RunFolder(
        path=path,
        name=path.resolve().name or str(path),
        settings=read_settings(path / CONFIG, problems),
        metrics=read_metrics(path / METRICS, problems),
        events=sorted(events, key=lambda row: row["step"]),
        samples=sorted(read_rows(path / SAMPLES, problems, parse_sample), key=lambda row: row["step"]),
        diagnoses=sorted(read_rows(path / DIAGNOSTICS, problems, parse_diagnosis), key=lambda row: row[0]),
        landscape=read_landscape(path / LANDSCAPE, problems),
        sources=read_sources(path / DATA, problems),
        checks=read_checks(path / DOCTOR, problems),
        best=read_object(path / BEST, problems),
        checkpoints=list_checkpoints(path),
        problems=problems,
        is_held=is_held(path),
    )


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Read several runs. Those whose folders have the same name are named after the last two parts of their paths."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    parts = [run.path.resolve().parts for run in runs]
    return [
        replace(run, name="/".join(part[-2:]) if names.count(run.name) > 1 else run.name)
        for run, part in zip(runs, parts, strict=True)
    ]


def read_metrics(path: Path, problems: list[str]) -> "dict[str, array[float]]":
    """Read the metrics as columns, sorted by step."""
    columns = {name: array("d") for name in COLUMNS}

    def keep(row: Row) -> None:
        for name in row:
            if name not in columns and name.startswith(BY_SOURCE) and len(columns) < MOST_COLUMNS:
                columns[name] = array("d", [math.nan] * len(columns["step"]))
        numbers = [to_number(row.get(name)) for name in columns]
        for column, number in zip(columns.values(), numbers, strict=True):
            column.append(number)

    read_rows(path, problems, keep)
    steps = columns["step"]
    if any(steps[i] > steps[i + 1] for i in range(len(steps) - 1)):
        order = sorted(range(len(steps)), key=steps.__getitem__)
        columns = {name: array("d", (column[i] for i in order)) for name, column in columns.items()}
    return columns


def parse_event(row: Row) -> Row:
    """Return an event after checking its kind, its message and its time."""
    return {**row, "kind": to_text(row["kind"]), "message": to_text(row["message"]), "time": to_number(row.get("time"))}


def read_autopsies(folder: Path, known: Collection[int], problems: list[str]) -> list[Row]:
    """Return an event for each autopsy that events.jsonl does not have: a rewind removes its row, but not its folder."""
    found: list[Row] = []
    for path in sorted((folder / EVENT_FOLDERS).glob(f"step_*/{EVENT}"))[:MOST_AUTOPSIES]:
        row = read_object(path, problems)
        if row and is_step(row.get("step")) and row["step"] not in known and isinstance(row.get("verdict"), str):
            found.append({"step": row["step"], "kind": "autopsy", "message": row["verdict"], "time": math.nan})
    return found


def parse_sample(row: Row) -> Row:
    """Return the step, prompt and text of a sample, after checking that prompt and text are strings."""
    return {"step": row["step"], "prompt": to_text(row["prompt"]), "text": to_text(row["text"])}


def parse_diagnosis(row: Row) -> tuple[int, Diagnosis]:
    """Return the step and its diagnostics."""
    return row["step"], Diagnosis(
        gradient_norms=to_numbers(row["gradient_norms"]),
        weight_norms=to_numbers(row["weight_norms"]),
        update_ratios=to_numbers(row["update_ratios"]),
        activations={str(block): to_numbers(values) for block, values in row["activations"].items()},
        clipped=to_number(row.get("clipped")),
    )


def read_landscape(path: Path, problems: list[str]) -> tuple[int, Landscape] | None:
    """Return (step of the weights, landscape); None if the file is missing or damaged."""
    row = read_object(path, problems)
    if row is None:
        return None
    try:
        grid_at, line_at = to_list(row["grid_at"]), to_list(row["line_at"])
        grid, line = [to_list(one) for one in row["grid"]], to_list(row["line"])
        if len(line) != len(line_at) or [len(one) for one in grid] != [len(grid_at)] * len(grid_at):
            raise ValueError(path)
        loss, seed, targets = (to_number(row[name]) for name in ("loss", "seed", "targets"))
        if not is_step(row.get("step")) or math.isnan(loss + seed + targets):
            raise ValueError(path)
        return row["step"], Landscape(loss, line_at, line, grid_at, grid, int(seed), int(targets))
    except (ValueError, TypeError, KeyError, OverflowError):
        problems.append(lay_out(path.name, "is not a valid landscape"))
        return None


def read_settings(path: Path, problems: list[str]) -> dict[str, Setting]:
    """Return the values of config.yaml by dotted key, each with the comment after it."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(CONFIG_BYTES)
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(path)
        return dict(list_settings(root, text))
    except OSError as error:
        problems.append(lay_out(path.name, f"cannot be read ({error.strerror or error})"))
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        problems.append(lay_out(path.name, "is not a valid run config"))
    return {}


def list_settings(root: yaml.MappingNode, text: str) -> Iterator[tuple[str, Setting]]:
    """Yield the dotted key and the setting of each entry in each section."""
    for section, body in root.value:
        for key, value in body.value:
            rest = text[value.end_mark.index :].partition("\n")[0]
            _, found, origin = rest.partition("# ")
            shown = text[value.start_mark.index : value.end_mark.index]
            yield f"{section.value}.{key.value}", Setting(shown.strip(), origin.strip() if found else "")


def parse_number(text: str) -> float | None:
    """Return the number that a setting's text stands for, or None if it is not a finite number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def list_checkpoints(folder: Path) -> list[tuple[int, Path, int]]:
    """Return (step, path, size in bytes) for each checkpoint, lowest step first."""
    found = []
    try:
        for path in folder.iterdir():
            if is_checkpoint(path):
                found.append((step_of(path), path, count_checkpoint_bytes(path)))
    except OSError:
        pass
    return sorted(found)
