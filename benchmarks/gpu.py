"""Tokens per second and MFU on one GPU, for the four shapes of the project, at windows of 2,048.

MFU = tokens/s x causal FLOPs per token (`smollm2 plan`) / 989 TFLOP/s. The micro-batch is the largest that fits, from a
list, and a step has at least 128k tokens. Without a GPU it says so and changes nothing.

    python benchmarks/gpu.py
"""

import argparse
import statistics
import time

from results import machine, publish

PEAK = 989e12
LENGTH, TOKENS_PER_STEP = 2048, 131_072
SHAPES = {"135M": "smollm2-135m", "360M": "smollm2-360m", "1.7B": "smollm2-1.7b", "768/12/12": ""}


def measure(name: str, size: int, steps: int, compiled: bool) -> dict[str, float]:
    """Tokens per second and peak memory with micro-batches of `size`. Raises torch.OutOfMemoryError."""
    import torch

    from smollm2.config.reading import load_config
    from smollm2.plan.arithmetic import flops_per_token
    from smollm2.runtime.device import start_runtime
    from smollm2.training.loop import build_model
    from smollm2.training.optim import build_optimizers
    from smollm2.training.step import update

    accumulation = max(1, TOKENS_PER_STEP // (size * LENGTH))
    training = {"batch_size": size, "gradient_accumulation_steps": accumulation, "compile": compiled}
    training |= {"sequence_length": LENGTH, "gradient_checkpointing": False}
    config = load_config(preset=SHAPES[name] or "smollm2-135m", training=training)
    if not SHAPES[name]:
        from smollm2.config.schema import Config

        config = Config.model_validate({"model": {}, "training": training})
    runtime = start_runtime(config.training)
    model = build_model(config, runtime)
    optimizers = build_optimizers(model, config.training)
    ids = torch.randint(0, config.model.vocab_size, (size, LENGTH + 1), device=runtime.device)
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * accumulation
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        update(model, optimizers, batch, runtime, learning_rate=1e-4, max_grad_norm=1.0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = accumulation * size * LENGTH / statistics.median(seconds[3:])
    mfu = rate * flops_per_token(config.model, LENGTH) / PEAK
    return {"micro_batch": size, "tokens_per_second": rate, "mfu": mfu, "gb": torch.cuda.max_memory_allocated() / 1e9}


def main() -> None:
    """Every shape, eager and compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 32, 16, 8, 4], help="micro-batches, tried in order"
    )
    parser.add_argument("--modes", choices=["eager", "compiled"], nargs="+", default=["compiled", "eager"])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here; nothing was measured, and nothing written")
        return
    found, rows, results = machine(), [], []
    for name in args.shapes:
        for mode in args.modes:
            for size in args.sizes:
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                try:
                    one = measure(name, size, args.steps, mode == "compiled")
                except torch.OutOfMemoryError:
                    continue
                rows.append(
                    [name, mode, size, f"{one['tokens_per_second']:,.0f}", f"{one['mfu']:.1%}", f"{one['gb']:.1f}"]
                )
                results.append({"shape": name, "mode": mode, **one})
                break
    columns = ["shape", "mode", "micro-batch", "tokens/s", "MFU", "peak GB"]
    publish(__file__, columns, rows, machine=found, results=results)


if __name__ == "__main__":
    main()
