"""How long a save stalls training and how long it takes: ours against torch.save, in turns.

Ours stalls training for the copy of its state; behind training's back it is written, synced, read back and checked, renamed,
and its folder synced. torch.save stalls for as long as it takes and leaves the rest to luck. `torch.save, synced` is the
same file with an fsync, the fair peer. A duration is taken with no training beside it.

    python benchmarks/checkpoint.py
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import machine, publish


def build_state(parameters: int) -> dict[str, Any]:
    """Weights and two moments in float32, as a run of so many parameters saves."""
    import torch

    from smollm2.checkpoint.format import FORMAT
    from smollm2.runtime.random_state import random_state

    width = 1024
    matrices = max(1, parameters // width**2)
    model = {f"layer.{n}.weight": torch.randn(width, width) for n in range(matrices)}
    moments = {
        n: {"exp_avg": torch.randn(width, width), "exp_avg_sq": torch.rand(width, width)} for n in range(matrices)
    }
    data: dict[str, Any] = {"seed": 1, "epoch": 0, "next_batch": 1, "order_version": 1}
    return {
        "format": FORMAT,
        "step": 1,
        "tokens": 1,
        "loss": 1.0,
        "model": model,
        "optimizer": {"adamw": {"parameters": [*model], "state": {"state": moments}}},
        "scheduler": {"step": 1, "learning_rate": 1e-3},
        "scaler": {},
        "data": {**data, "tokens_fingerprint": "", "tokens": 1, "windows": 1},
        "rng": random_state(),
        "stability": {"skipped": [], "losses": [], "spikes": [], "pending": [], "best_validation_loss": math.inf},
        "best": {},
        "config": "{}",
        "tokenizer": {"text": "", "fingerprint": "", "vocab_size": 257, "end_of_text": 256},
        "env": {},
        "wandb_run_id": "",
        "created_unix": 0,
    }


def main() -> None:
    """All forms in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--millions", type=int, nargs="+", default=[12, 60])
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    import torch

    from smollm2.checkpoint.format import take_snapshot
    from smollm2.checkpoint.saving import save_checkpoint

    found, rows, results = machine(), [], []
    for millions in args.millions:
        state = build_state(millions * 10**6)
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder, buffers = Path(name), dict[str, Any]()

            def ours(
                number: int, folder: Path = folder, state: dict[str, Any] = state, buffers: dict[str, Any] = buffers
            ) -> float:
                began = time.perf_counter()
                snapshot = take_snapshot({**state, "step": number}, buffers)
                stall = time.perf_counter() - began
                save_checkpoint(folder, snapshot, step=number)
                return stall

            def plain(number: int, folder: Path = folder, state: dict[str, Any] = state) -> None:
                torch.save(state, folder / "plain.pt")

            def synced(number: int, folder: Path = folder, state: dict[str, Any] = state) -> None:
                with (folder / "synced.pt").open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())

            forms: dict[str, Callable[[int], float | None]] = {
                "ours": ours,
                "torch.save": plain,
                "torch.save, synced": synced,
            }
            seconds: dict[str, list[float]] = {name: [] for name in forms}
            stalls: dict[str, list[float]] = {name: [] for name in forms}
            for number in range(1, args.rounds + 1):
                for name in list(forms) if number % 2 else reversed(list(forms)):
                    started = time.perf_counter()
                    stall = forms[name](number)
                    seconds[name].append(time.perf_counter() - started)
                    stalls[name].append(seconds[name][-1] if stall is None else stall)
                for path in folder.glob("step_*.pt"):
                    path.unlink()
        size = 12 * millions * 10**6
        for name in forms:
            duration, stall = statistics.median(seconds[name]), statistics.median(stalls[name])
            ratio = f"{stall / statistics.median(stalls['torch.save, synced']):.2f}"
            rate = f"{size / duration / 1e6:,.0f}"
            rows.append([f"{millions}M", name, f"{stall:.2f}", f"{duration:.2f}", rate, ratio])
        results.append({"parameters": millions * 10**6, "seconds": seconds, "stalls": stalls})
    columns = ["parameters", "form", "stall, s", "duration, s", "MB/s", "stall of torch.save, synced"]
    publish(__file__, columns, rows, machine=found, results=results)


if __name__ == "__main__":
    main()
