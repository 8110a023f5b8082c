"""The name of every file in a run folder, in one place."""

import re
from pathlib import Path

CONFIG = "config.yaml"
RUN_LOG = "run.log"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"
LANDSCAPE = "landscape.json"
DATA = "data.json"
DOCTOR = "doctor.json"
REPORT = "report.html"
LATEST = "latest.json"
BEST = "best.json"
SUPERSEDED = "superseded"
TOKENIZER = "tokenizer"
LOCK = ".lock"
RANKS = ".ranks"
EVENT_FOLDERS = "events"
EVENT = "event.json"

MANIFEST = "manifest.json"

CHECKPOINT = re.compile(r"step_([0-9]{1,18})(?:\.pt)?")
"""A file `step_0500.pt` or a folder `step_0500`."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, such as `folder/step_0500.pt` for step 500."""
    return folder / f"step_{step:04d}.pt"


def parts_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint if it is a folder, such as `folder/step_0500`."""
    return folder / f"step_{step:04d}"


def find_checkpoint(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint: the folder if there is one, else the file."""
    parts = parts_path(folder, step)
    return parts if parts.is_dir() else checkpoint_path(folder, step)


def next_step_path(path: Path) -> Path:
    """Return the path of the record of the step after a checkpoint: `step_0500.next.json` beside `step_0500.pt`."""
    return path.with_name(f"{path.stem}.next.json")


def event_path(folder: Path, step: int) -> Path:
    """Return the folder with the autopsy of a step, such as `folder/events/step_0500`."""
    return folder / EVENT_FOLDERS / f"step_{step:04d}"


def is_checkpoint(path: Path) -> bool:
    """Return whether the path is named like a checkpoint and is a file or folder, as its name says; no links."""
    if not CHECKPOINT.fullmatch(path.name) or path.is_symlink():
        return False
    return path.is_file() if path.suffix else path.is_dir()


def is_parted(path: Path) -> bool:
    """Return whether the path, of any name, is a checkpoint that is a folder. Raise OSError for an impossible name."""
    return path.is_dir() and (path / MANIFEST).exists()


def count_checkpoint_bytes(path: Path) -> int:
    """Return the size of a checkpoint. Raise OSError if it is gone."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, or -1 if it has none. Sort checkpoints by this number, never by name."""
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else -1
