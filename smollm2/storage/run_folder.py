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
REPORT = "report.html"
LATEST = "latest.json"
BEST = "best.json"
SUPERSEDED = "superseded"
TOKENIZER = "tokenizer"
LOCK = ".lock"
RANKS = ".ranks"

CHECKPOINT = re.compile(r"step_([0-9]{1,18})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, such as `folder/step_0500.pt` for step 500."""
    return folder / f"step_{step:04d}.pt"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, or -1 if it has none. Sort checkpoints by this number, never by name."""
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else -1
