"""What W&B's offline files hold, read by wandb's own reader, and a diagnosis to send there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from smollm2.tracking.base import Diagnosis, Histogram

NAMES = ("model.embed_tokens.weight", "model.layers.0.q.weight", "model.layers.0.k.weight", "model.norm.weight")
DIAGNOSIS = Diagnosis(
    gradient_norms=dict(zip(NAMES, (1.0, 3.0, 4.0, 0.5), strict=True)),
    weight_norms=dict(zip(NAMES, (10.0, 6.0, 8.0, 1.0), strict=True)),
    update_ratios=dict(zip(NAMES, (0.01, 0.5, 0.0, 0.02), strict=True)),
    activations={"layers.0": {"rms": 1.5, "dead_units": 0.25}},
    clipped=0.75,
    gradient_histograms={"model.norm.weight": Histogram((3, 1), (-1.0, 0.0, 2.0))},
    weight_histograms={"model.norm.weight": Histogram((5, 6), (0.0, 0.5, 1.0))},
)


def records(folder: Path) -> list[dict[str, Any]]:
    """All records of all offline runs in the folder, by wandb's own reader."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def select(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def history(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logged rows, without wandb's own columns."""
    items = [row["item"] for row in select(found, "history")]
    return [{name: value for name, value in item.items() if not name.startswith("_")} for item in items]
