"""Tiny runs, which several test files start, stop and compare."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import content_hash
from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.storage.run_folder import find_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CLOCK_COLUMNS = {"tokens_per_second", "rank_seconds_min", "rank_seconds_median", "rank_seconds_max"}

TINY = """
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
  max_position_embeddings: 32, norm: rmsnorm}
training: {train_steps: 12, batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 1e-2, warmup_steps: 2,
  precision: float32, log_interval: 1, eval_interval: 5, eval_windows: 8, save_interval: 4, sample_interval: 6,
  sample_tokens: 4, sample_prompts: [a], preflight: false}
data: {tokenizer: bytes, validation_fraction: 0.1}
"""
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly box, and nobody minds. "


def write_tiny(folder: Path, *, text: str = WORDS * 40, config: str = TINY) -> Path:
    """A folder with input.txt and config.yaml of a run that takes half a second; returns the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.txt").write_text(text, encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(config, encoding="utf-8")
    return path


def tiny_config(folder: Path, save_dir: str = "checkpoints", /, **flags: object) -> Config:
    """The config of a tiny run in `folder`, which must exist; flags as dotted keys with `__` for the dot."""
    given = {"data.input": str(folder / "input.txt"), "training.save_dir": str(folder / save_dir)}
    given |= {name.replace("__", "."): str(value) for name, value in flags.items()}
    return load_config(folder / "config.yaml", flags={key: (f"--{key}", value) for key, value in given.items()})


def outcome(folder: Path, step: int) -> tuple[str, list[dict[str, Any]]]:
    """What must be bit-identical: a hash of weights, moments and position after `step`, and the metrics rows."""
    state = load_checkpoint(find_checkpoint(folder, step))
    kept = {
        name: state[name] for name in ("model", "optimizer", "scheduler", "step", "tokens", "loss", "rng", "stability")
    }
    return content_hash(kept), metrics(folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the clock's columns."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK_COLUMNS} for row in rows]


def weights(folder: Path, step: int = 12) -> dict[str, Tensor]:
    """Return the weights of a run's checkpoint by name."""
    found: dict[str, Tensor] = load_checkpoint(folder / f"step_{step:04d}.pt")["model"]
    return found
