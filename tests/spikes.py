"""A tiny run in which the batch of a known step is garbage, for tests of what happens at a spike."""

import json
import random
from pathlib import Path
from typing import Any

from runs import TINY, WORDS, tiny_config, write_tiny

from smollm2.config.schema import Config
from smollm2.data.batches import Batches

SPIKE, LAST = 145, 150
"""The step whose batch is garbage, and the last one."""

FLAGS = {
    "training__train_steps": LAST,
    "training__gradient_accumulation_steps": 1,
    "training__schedule": "wsd",
    "training__decay_steps": 1,
    "training__save_interval": 20,
    "training__log_interval": 1,
    "training__eval_interval": 0,
    "training__diagnostics_interval": 0,
    "training__sample_interval": 0,
    "data__validation_fraction": 0,
}


def config_of(folder: Path, **flags: object) -> Config:
    return tiny_config(folder, **(FLAGS | flags))


def write_text(folder: Path, *, with_garbage: bool) -> Path:
    """A text that is read once; with garbage in all windows of the batch of step SPIKE."""
    text = bytearray((WORDS * 250).encode())
    if with_garbage:
        noise = random.Random(1)
        count = (len(text) - 1) // 32
        for window in Batches([Windows(count)], 1337, 4).window_ids(SPIKE - 1).tolist():
            text[32 * window : 32 * window + 32] = bytes(noise.choice(b"~^|{}@#$%&*<>=_") for _ in range(32))
    write_tiny(folder, text=text.decode(), config=TINY)
    return folder


class Windows:
    """As many windows as the text has; only their order is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    length = 32
    tokens_used = 0

    def __len__(self) -> int:
        return self.count

    def read(self, i: int) -> Any:
        raise NotImplementedError


def event_of(folder: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "checkpoints/events" / f"step_{step:04d}/event.json").read_text())
    return found
