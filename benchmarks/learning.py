"""Steps and seconds to nanoGPT's loss: Shakespeare as characters, its CPU budget, AdamW and Muon.

nanoGPT's own code ends at 1.905 on the whole validation split after 2,000 updates (4 layers, 128 wide, 64 tokens, 12
sequences, seed 1337). Its code is not at hand here: its time is that of its steps at the pace of transformers' GPT-2 of the
same shape, taken before and after each of our runs. Validation is in nobody's seconds.

    python benchmarks/learning.py            # needs ../shared/data/tinyshakespeare.txt, or --input_file
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from results import machine, publish

TARGET, STEPS, BATCH, LENGTH = 1.905, 2000, 12, 64
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": LENGTH, "norm": "rmsnorm"}
RECIPES: dict[str, dict[str, Any]] = {
    "AdamW 1e-3": {
        "training": {"optimizer": "adamw", "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 100}
    },
    "Muon 6e-3": {
        "model": {"initializer_range": 0.05},
        "training": {
            "optimizer": "muon",
            "learning_rate": 6e-3,
            "schedule": "linear",
            "warmup_steps": 30,
            "betas": [0.8, 0.99],
        },
    },
}
"""What was tried before these: docs/decisions/0006-muon-of-our-own.md."""


def learn(text: Path, folder: Path, recipe: dict[str, Any], seed: int, steps: int, every: int) -> list[dict[str, Any]]:
    """Return the records of a run that validates on the whole split every `every` steps."""
    from smollm2.config.reading import load_config
    from smollm2.training.loop import train

    path = folder / "config.yaml"
    path.write_text("{}\n")
    config = load_config(
        path,
        model={**SHAPE, **recipe.get("model", {})},
        training={
            **{"train_steps": steps, "batch_size": BATCH, "gradient_accumulation_steps": 1, "seed": seed},
            **{"weight_decay": 0.1, "betas": [0.9, 0.99], "eval_interval": every, "eval_windows": 10**9},
            **{"log_interval": every, "save_interval": 0, "sample_tokens": 0, "save_dir": str(folder / "run")},
            **recipe["training"],
        },
        data={"input": str(text), "tokenizer": "bytes", "validation_fraction": 0.1},
    )
    train(config)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def pace_of_nanogpt(turns: int = 5, steps: int = 20) -> float:
    """Median seconds of an update of nanoGPT's recipe: GPT-2 blocks, fused AdamW, clipping, in float32 as its README runs it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=65,
            n_positions=LENGTH,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            **dropout,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    ids = torch.randint(0, 65, (BATCH, LENGTH))
    seconds = []
    for _ in range(turns * steps):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Run each recipe with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    parser.add_argument("--input_file", type=Path, default=beside)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=50, help="updates between two validations")
    args = parser.parse_args()
    found = machine("transformers")
    rows, results = [], []
    for name, seed in itertools.product(args.recipes, args.seeds):
        before = pace_of_nanogpt()
        with tempfile.TemporaryDirectory() as folder:
            log = learn(args.input_file.resolve(), Path(folder), RECIPES[name], seed, args.steps, args.every)
        theirs = STEPS * statistics.mean((before, pace_of_nanogpt()))
        losses = {row["step"]: row["validation_loss"] for row in log if "validation_loss" in row}
        rates = [row["tokens_per_second"] for row in log if row.get("tokens_per_second")]
        pace = BATCH * LENGTH / statistics.median(rates)
        reached = next((step for step, loss in losses.items() if loss <= TARGET), None)
        seconds = reached * pace if reached else None
        results.append(
            {
                "recipe": name,
                "seed": seed,
                "validation_loss": losses,
                "seconds_per_step": pace,
                "nanogpt_seconds": theirs,
            }
        )
        last = max(losses)
        rows.append(
            [
                name,
                seed,
                reached or "never",
                f"{reached / STEPS:.2f}" if reached else "-",
                f"{seconds:.0f}" if seconds else "-",
                f"{theirs:.0f}",
                f"{seconds / theirs:.2f}" if seconds else "-",
                f"{losses[last]:.3f}",
            ]
        )
    columns = [
        "recipe",
        "seed",
        f"step that reaches {TARGET}",
        "of nanoGPT's steps",
        "seconds",
        "nanoGPT's",
        "ratio",
        f"loss at {args.steps}",
    ]
    publish(__file__, columns, rows, machine=found, cores=found["cores"], results=results)


if __name__ == "__main__":
    main()
