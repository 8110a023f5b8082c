"""Tokens per second, MFU and peak memory on one GPU for the four shapes of the project, at windows of 2,048 tokens.

Each shape is swept: attention and compilation at one micro-batch, then micro-batches with the best of them, from the
largest that fits. The best setting is measured again with at least 131,072 tokens a step. `--toy` goes the same way on a
CPU with a model of a few thousand parameters: its figures mean nothing, they show that the script works.

    python benchmarks/gpu.py                      # prints a table, writes gpu.json and README.md
    python benchmarks/gpu.py --json results.json  # leaves this folder as it is
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results import machine, publish

MFU_FORMULA = "tokens/s x (6 N_nonembedding + 6 V d + 6 L d_attention T) / peak; causal attention counted once"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 FLOP/s by a part of the GPU's name, from the makers' data sheets. Another GPU gets no MFU."""

ATTENTION = ["sdpa", "varlen", "flex"]
COLUMNS = ["shape", "attention", "compile", "micro-batch", "tokens/s", "MFU", "peak GB", ""]


@dataclass(frozen=True)
class Shape:
    """A model to measure: a preset, or sections of a config where it has none, and the micro-batches to try."""

    name: str
    preset: str | None
    sizes: tuple[int, ...]
    length: int = 2048
    tokens_per_step: int = 131_072
    model: tuple[tuple[str, object], ...] = ()


SHAPES = [
    Shape("135M", "smollm2-135m", (64, 32, 16, 8)),
    Shape("360M", "smollm2-360m", (64, 32, 16, 8)),
    Shape("1.7B", "smollm2-1.7b", (16, 8, 4, 2)),
    Shape("768/12/12/3072", None, (64, 32, 16, 8)),
]
TOY = Shape(
    "toy",
    None,
    (4, 2),
    length=32,
    tokens_per_step=256,
    model=tuple(
        {
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        }.items()
    ),
)


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    attention: str
    compiled: bool
    micro_batch: int


def measure(shape: Shape, setting: Setting, steps: int, *, tokens_per_step: int) -> dict[str, float]:
    """Return tokens per second, FLOPs per token and peak memory of `steps` optimizer steps after two for warm-up.

    Raise torch.OutOfMemoryError if the micro-batch does not fit, and ConfigError, TrainingError or RuntimeError if this
    GPU cannot run the setting.
    """
    import torch

    from smollm2.config.reading import load_config
    from smollm2.config.schema import Config
    from smollm2.plan.arithmetic import flops_per_token
    from smollm2.runtime.device import start_runtime
    from smollm2.training.optim import build_optimizers
    from smollm2.training.setup import build_model
    from smollm2.training.step import train_step

    accumulation = max(1, tokens_per_step // (setting.micro_batch * shape.length))
    training = {
        "batch_size": setting.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "sequence_length": shape.length,
        "attention": setting.attention,
        "compile": setting.compiled,
        "gradient_checkpointing": False,
    }
    own = {"model": dict(shape.model), "training": training}
    config = load_config(preset=shape.preset, training=training) if shape.preset else Config.model_validate(own)
    runtime = start_runtime(config.training)
    on_gpu = runtime.device.type == "cuda"
    model = build_model(config, runtime)
    optimizers = build_optimizers(model, config.training)
    ids = torch.randint(0, config.model.vocab_size, (setting.micro_batch, shape.length + 1), device=runtime.device)
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * accumulation
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        train_step(model, optimizers, batch, runtime, learning_rate=1e-4, max_grad_norm=1.0)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_second": accumulation * setting.micro_batch * shape.length / statistics.median(seconds[2:]),
        "flops_per_token": flops_per_token(config.model, shape.length),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    }


def try_setting(shape: Shape, setting: Setting, steps: int, *, final: bool = False) -> dict[str, Any]:
    """Return one result row; a setting that cannot run has the reason under `problem`. The GPU's memory is free after."""
    import torch

    from smollm2.errors import Smollm2Error

    # In the sweep one micro-batch is a step: its rate differs little, and a shape has to be done in minutes.
    tokens = shape.tokens_per_step if final else 0
    row: dict[str, Any] = {"shape": shape.name, "length": shape.length, "final": final, **asdict(setting)}
    try:
        row |= measure(shape, setting, steps, tokens_per_step=tokens)
    except torch.OutOfMemoryError:
        row["problem"] = "out of memory"
    except (Smollm2Error, RuntimeError) as error:  # a kernel that this GPU lacks; the other settings can still run
        row["problem"] = str(error).splitlines()[0][:200]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return row


def sweep(
    shape: Shape, attention: list[str], modes: list[bool], steps: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shape: backends and modes at the second smallest micro-batch, then micro-batches, then the best.

    What would begin after `deadline` is left out, the last measurement excepted.
    """
    rows: list[dict[str, Any]] = []

    def run(setting: Setting) -> Iterator[dict[str, Any]]:
        if time.monotonic() < deadline and not any(row_setting(row) == setting for row in rows):
            rows.append(try_setting(shape, setting, steps))
            yield rows[-1]

    middle = shape.sizes[-2]
    for compiled in modes:
        for name in attention:
            yield from run(Setting(name, compiled, middle))
    best = find_best(rows)
    if best is None:
        return
    for size in shape.sizes:
        yield from run(Setting(best.attention, best.compiled, size))
    best = find_best(rows)
    assert best is not None
    yield try_setting(shape, best, 2 * steps, final=True)


def row_setting(row: dict[str, Any]) -> Setting:
    """Return the setting of a row."""
    return Setting(row["attention"], row["compiled"], row["micro_batch"])


def find_best(rows: list[dict[str, Any]]) -> Setting | None:
    """Return the setting with the highest rate, or None if nothing ran."""
    ran = [row for row in rows if "problem" not in row]
    return row_setting(max(ran, key=lambda row: float(row["tokens_per_second"]))) if ran else None


def find_peak(gpu: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def describe_row(row: dict[str, Any], peak: float | None) -> list[object]:
    """Return a row as the cells of the table."""
    cells: list[object] = [row["shape"], row["attention"], "yes" if row["compiled"] else "no", row["micro_batch"]]
    if "problem" in row:
        return [*cells, "", "", "", row["problem"].replace("|", "/")]
    mfu = f"{row['mfu']:.1%}" if peak else "unknown"
    best = "best, whole step" if row["final"] else ""
    return [*cells, f"{row['tokens_per_second']:,.0f}", mfu, f"{row['peak_gb']:.1f}", best]


def main() -> None:
    """Sweep every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", choices=names, nargs="+", default=names)
    parser.add_argument("--attention", choices=ATTENTION, nargs="+", default=ATTENTION)
    parser.add_argument("--modes", choices=["eager", "compiled"], nargs="+", default=["compiled", "eager"])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of one setting; the best gets twice as many")
    parser.add_argument(
        "--minutes", type=float, default=14, help="for all shapes together; what is left then is left out"
    )
    parser.add_argument("--json", type=Path, help="write the results here, and nothing else")
    parser.add_argument("--toy", action="store_true", help="a tiny model on whatever device there is")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not args.toy:
        print("no CUDA GPU here; nothing was measured, and nothing written")
        return
    found = machine()
    peak = find_peak(str(found.get("gpu", "")))
    print(f"MFU = {MFU_FORMULA}")
    print(f"peak = {peak / 1e12:.0f} TFLOP/s (bf16, dense)" if peak else "peak = unknown for this device: no MFU")
    shapes = [TOY] if args.toy else [shape for shape in SHAPES if shape.name in args.shapes]
    modes = [mode == "compiled" for mode in args.modes]
    results: list[dict[str, Any]] = []
    started = time.monotonic()
    for number, shape in enumerate(shapes, 1):
        deadline = started + 60 * args.minutes * number / len(shapes)
        for row in sweep(shape, args.attention, modes, args.steps, deadline):
            if peak and "problem" not in row:
                row["mfu"] = row["tokens_per_second"] * row["flops_per_token"] / peak
            results.append(row)
            print(*describe_row(row, peak), sep=" | ", flush=True)
    rows = [describe_row(row, peak) for row in results]
    more = {"machine": found, "mfu_formula": MFU_FORMULA, "peak_flops": peak, "results": results}
    if args.json:
        content = {"columns": COLUMNS, "rows": rows, **more}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    else:
        publish(__file__, COLUMNS, rows, **more)


if __name__ == "__main__":
    main()
