"""Run folders as a run would leave them, written by the tracker that writes them: for tests of what reads such folders."""

import json
import math
import random
from pathlib import Path

import numpy as np

from smollm2.config.reading import effective_config_yaml, load_config
from smollm2.data.overlap import Overlap
from smollm2.data.statistics import summarize_documents
from smollm2.storage.run_folder import DATA
from smollm2.tracking.base import Diagnosis, Fanout, Landscape, Sample
from smollm2.tracking.jsonl import JsonlTracker

PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write_run(folder: Path, *, reports: int = 40, interval: int = 10, name: str = "run", **flags: str) -> Path:
    """A finished run that stopped once on its way, with everything that a report shows. The same bytes every time, save
    for the times of events."""
    run, steps = folder / name, reports * interval
    run.mkdir(parents=True)
    given = {"training.train_steps": str(steps), **{key.replace("__", "."): value for key, value in flags.items()}}
    origins = {"training.learning_rate": "nano.yaml:21", **{key: f"--{key}" for key in given}}
    config = load_config(preset="nano", flags={key: (f"--{key}", value) for key, value in given.items()})
    (run / "config.yaml").write_text(effective_config_yaml(config, origins), encoding="utf-8")
    write_data(run, "data/documentation", "data/stories")
    tracker = Fanout([JsonlTracker(run, 0, print)])
    log_start(tracker, 0)
    noise = random.Random(0)
    middle = (reports // 2) * interval
    for step in range(interval, steps + 1, interval):
        log_report(tracker, step, steps, noise)
        if step % max(interval, steps // 8 // interval * interval) == 0:
            loss = 4.2 + 4 * math.exp(-5 * step / steps)
            tracker.log({"validation_loss": loss, "validation_bpb": loss / 2.49}, step)
            tracker.log_text(
                [Sample(prompt, write_words(noise, step / steps)) for prompt in ("Once upon a time", "")], step
            )
            log_inside(tracker, step, steps, noise)
        if step == middle:
            tracker.log_event("skip", f"step {step}: not finite (loss nan, gradient norm inf)", step, windows=[1, 2])
            tracker.log_event("checkpoint", f"saved step_{step:04d}.pt", step, path=f"step_{step:04d}.pt")
            tracker.log_event("stopped", "", step, reason=f"stopped by SIGTERM after step {step}, which is saved")
            tracker.log_event("resume", f"resuming from step_{step:04d}.pt after step {step}: bit-exact", step)
            log_start(tracker, step)
    log_end(tracker, run, steps)
    return run


def log_start(tracker: Fanout, step: int) -> None:
    """What a process of a run leaves when it begins."""
    statistics = {"characters": 1_947_559, "bytes": 1_951_000, "documents": 457, "tokens": 531_380, "unknown_bytes": 0}
    counts = {"unknown_documents": 0, "train_tokens": 504_388, "validation_tokens": 26_992, "windows": 3_941}
    use = {"window_tokens": 128, "tokens_used": 504_388, "epochs": 4.06, "vocab_size": 4096}
    tracker.log_event("data", "", step, input="input.txt", tokenizer="auto", **statistics, **counts, **use)
    machine = {"device": "cpu AVX512", "precision": "bf16", "threads": 2, "world_size": 1, "torch": "2.13.0"}
    tracker.log_event("start", "", step, system="Linux x86_64", **machine, python="3.11.2", smollm2="0.1.0")


def write_data(run: Path, *names: str) -> None:
    """data.json: sources with lengths as web pages have them, one of which is read more than once."""
    sources = []
    for number, name in enumerate(names):
        noise = np.random.default_rng(number)
        tokens = noise.lognormal(6 + number % 5 / 2, 1.2, 400).astype(np.uint64) + np.uint64(1)
        contents = np.append(np.arange(390), np.arange(10)).astype(np.uint64)
        characters, total = 4 * tokens, int(tokens.sum())
        size = int(characters.sum()) + 17
        overlap = Overlap(0.034 + number / 20, 26_980, 504_388, 504_388, 26_992, 26_992)
        source = {"name": name, "weight": 1 / len(names), "epochs": 1.5, "documents": 400, "characters": 4 * total}
        source |= {"bytes": size, "tokens": total, "train_tokens": total - 5_000, "validation_tokens": 5_000}
        source |= {"blank_documents": 3, "unknown_bytes": 0, "overlap": overlap.as_dict()}
        sources.append({**source, "summary": summarize_documents(characters, tokens, contents, size)})
    (run / DATA).write_text(json.dumps({"sources": sources}), encoding="utf-8")


def log_report(tracker: Fanout, step: int, steps: int, noise: random.Random) -> None:
    """A row of metrics that falls as a training does."""
    done = step / steps
    loss = 3.1 + 5.2 * math.exp(-6 * done) + noise.gauss(0, 0.08)
    rate = 3e-3 * min(1.0, 20 * done) * (0.55 + 0.45 * math.cos(math.pi * done))
    row = {"tokens": step * 2048, "epoch": step * 2048 / 504_388, "loss": loss, "learning_rate": rate}
    speed = 14_000 * noise.uniform(0.9, 1.05)
    tracker.log({**row, "grad_norm": abs(noise.gauss(1.3, 0.25)), "skipped": 0, "tokens_per_second": speed}, step)


def write_words(noise: random.Random, done: float) -> str:
    """Text that gets longer words as a run progresses."""
    words = ["the", "of", "a", "in", "is", "function", "returns", "value", "object", "sequence", "otherwise"]
    return " " + " ".join(noise.choice(words[: 3 + int(8 * done)]) for _ in range(40)) + "."


def log_inside(tracker: Fanout, step: int, steps: int, noise: random.Random) -> None:
    """Diagnostics of a model of four blocks."""
    done = step / steps
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in PARTS]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight"]
    depth = {name: (int(name.split(".")[2]) if ".layers." in name else 2) for name in names}
    tracker.log_diagnosis(
        Diagnosis(
            gradient_norms={n: 0.4 * math.exp(-0.5 * depth[n] - done) * noise.uniform(0.7, 1.3) for n in names},
            weight_norms={n: 11 + 6 * done * (1 + 0.2 * depth[n]) for n in names},
            update_ratios={n: 4e-3 * (1.05 - done) * noise.uniform(0.6, 1.4) for n in names},
            activations={
                f"model.layers.{layer}": {
                    "rms": 0.6 + 0.4 * layer + done,
                    "max_abs": 4 + 9 * done * (layer + 1),
                    "max_attention_logit": 3 + 12 * done + layer,
                    "dead_units": 0.02 * layer * done,
                }
                for layer in range(4)
            },
            clipped=0.6 - 0.4 * done,
        ),
        step,
    )


def log_end(tracker: Fanout, run: Path, steps: int) -> None:
    """The landscape, the last checkpoint, and the end."""
    at = [round(-1 + i / 10, 2) for i in range(21)]
    grid = [
        [3.2 + 2.1 * x * x + 1.4 * y * y + 0.5 * x * y + 0.1 * math.cos(7 * x) * math.sin(5 * y) for y in at]
        for x in at
    ]
    line = [3.2 + 2.1 * x * x for x in at]
    tracker.log_landscape(Landscape(3.2, at, line, at, grid, seed=0, targets=16_384), steps)
    (run / f"step_{steps:04d}.pt").write_bytes(b"weights")
    tracker.log_event("checkpoint", f"saved step_{steps:04d}.pt", steps, path=f"step_{steps:04d}.pt")
    best = {"file": f"step_{steps:04d}.pt", "step": steps, "validation_loss": 4.22}
    (run / "best.json").write_text(json.dumps(best))
    tracker.log_event("done", "", steps, seconds=160.2)
    tracker.close()
