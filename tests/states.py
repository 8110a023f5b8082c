"""Checkpoint states of a few hundred weights, for tests that save, damage and load them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smollm2.checkpoint.format import FORMAT
from smollm2.checkpoint.saving import save_checkpoint


def small_state(step: int = 1) -> dict[str, Any]:
    """A whole state of a tied model with a few hundred weights; another step has other numbers everywhere."""
    generator = torch.Generator().manual_seed(step)
    embedding = torch.randn(8, 4, generator=generator)
    return {
        "format": FORMAT,
        "step": step,
        "tokens": 100 * step,
        "loss": 1.0 / (1 + step),
        "model": {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": torch.randn(4, generator=generator).bfloat16(),
            "lm_head.weight": embedding,
        },
        "optimizer": {
            "adamw": {
                "parameters": ["model.embed_tokens.weight", "model.norm.weight"],
                "state": {
                    "state": {
                        0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(8, 4, generator=generator)}
                    },
                    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "params": [0, 1]}],
                },
            }
        },
        "scheduler": {"schedule": "cosine", "step": step, "learning_rate": 1e-3},
        "scaler": {},
        "data": {
            "seed": 1,
            "epoch": 0,
            "next_batch": step,
            "order_version": 1,
            "tokens_fingerprint": "f" * 64,
            "tokens": 1000,
            "windows": 10,
        },
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": [],
            "python": random.Random(step).getstate(),
            "numpy": {"kind": "MT19937", "keys": torch.arange(5), "position": 3, "has_gauss": 0, "gauss": 0.0},
        },
        "stability": {
            "skipped": [],
            "best_validation_loss": float("inf"),
            "losses": [2.5],
            "spikes": [],
            "pending": [],
        },
        "best": {},
        "config": '{"model": {}}',
        "tokenizer": {"text": "bytes", "fingerprint": "b" * 64, "vocab_size": 257, "end_of_text": 256},
        "env": {"torch": str(torch.__version__), "threads": 1},
        "wandb_run_id": "",
        "created_unix": 1.5e9,
    }


def save_steps(folder: Path, *steps: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [save_checkpoint(folder, small_state(step), step=step) for step in steps]


def write_raw(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A file that torch itself writes, of a state as it lies on the disk after `change`."""
    content = torch.load(save_steps(path.parent / "sound", 1)[0], weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def never(line: str) -> None:
    pytest.fail(f"nothing was to be refused: {line}")


def set_weight(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({"model.norm.weight": value})
