"""Training speed and peak memory: this package against a plain loop over transformers' LlamaForCausalLM.

Both take the same shape, data, precision, threads, optimizer and clipping, each in a process of its own. The processes
take turns, so that a busy machine slows both; a ratio is the median over the pairs. Run:

    python benchmarks/train_speed.py            # prints a table, writes benchmarks/train_speed.json
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
BATCH, LENGTH = 8, 256
LEARNING_RATE, MAX_GRAD_NORM = 3e-4, 1.0


def build_ours(precision: str, compiled: bool) -> Callable[[], float]:
    """One update of this package, as `train` makes it."""
    import torch

    from smollm2.attention import choose_backend
    from smollm2.config import ModelConfig, TrainingConfig
    from smollm2.model import SmolLM2
    from smollm2.optim import build_optimizers
    from smollm2.runtime import compile_blocks, start_runtime
    from smollm2.step import update

    config = TrainingConfig(precision=precision, learning_rate=LEARNING_RATE)
    runtime = start_runtime(config)
    model = SmolLM2(ModelConfig(norm="rmsnorm", **SHAPE))
    for layer in model.model.layers:
        layer.self_attn.backend = choose_backend("auto", runtime.device.type, runtime.precision.dtype)
    if compiled:
        compile_blocks(model.model.layers)
    optimizers = build_optimizers(model, config)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]

    def step() -> float:
        result = update(model, optimizers, batch, runtime, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
        return result.loss

    return step


def build_transformers(precision: str, compiled: bool) -> Callable[[], float]:
    """One update of a plain loop: autocast, the model's own loss, torch's clipping and fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1337)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5))
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    input_ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=input_ids, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


BUILDERS = {"ours": build_ours, "transformers": build_transformers}


def serve(name: str, precision: str, compiled: bool, threads: int) -> None:
    """Child process: for each number read from standard input make that many updates and answer with one JSON line."""
    import torch

    torch.set_num_threads(threads)
    step = BUILDERS[name](precision, compiled)
    before = peak_megabytes()
    for line in sys.stdin:
        started = time.perf_counter()
        losses = [step() for _ in range(int(line))]
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "loss": losses[-1], "peak_mb": peak_megabytes(), "before_mb": before}
        print(json.dumps(answer), flush=True)


def peak_megabytes() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Contestant:
    """A child process that makes updates when told."""

    def __init__(self, name: str, precision: str, compiled: bool, threads: int) -> None:
        flags = ["--child", name, "--precision", precision, "--threads", str(threads)]
        command = [sys.executable, __file__, *flags, *(["--compiled"] if compiled else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, steps: int) -> dict[str, float]:
        """Seconds and peak memory of so many updates."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(precision: str, compiled: bool, pairs: int, steps: int, threads: int) -> dict[str, object]:
    """Interleaved pairs of ours and the peer; medians."""
    contestants = {name: Contestant(name, precision, compiled, threads) for name in BUILDERS}
    for contestant in contestants.values():
        contestant.run(3)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in BUILDERS}
    for pair in range(pairs):
        for name in list(BUILDERS) if pair % 2 == 0 else reversed(list(BUILDERS)):
            runs[name].append(contestants[name].run(steps))
    for contestant in contestants.values():
        contestant.close()
    rates = {name: [steps * BATCH * LENGTH / run["seconds"] for run in found] for name, found in runs.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["transformers"], strict=True)]
    memory = {name: found[-1]["peak_mb"] for name, found in runs.items()}
    training = {name: found[-1]["peak_mb"] - found[-1]["before_mb"] for name, found in runs.items()}
    return {
        "precision": precision,
        "compiled": compiled,
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "speed_ratio": round(statistics.median(ratios), 3),
        "speed_ratios": [round(ratio, 3) for ratio in ratios],
        "peak_mb": {name: round(value) for name, value in memory.items()},
        "training_mb": {name: round(value) for name, value in training.items()},
        "memory_ratio": round(memory["ours"] / memory["transformers"], 3),
        "final_loss": {name: round(found[-1]["loss"], 3) for name, found in runs.items()},
    }


def machine() -> dict[str, object]:
    """What the figures hold for."""
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers")}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), **versions}


def main() -> None:
    """Run the comparison, or one child of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="updates in one turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["float32", "bf16"], help="default: both")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--child", choices=BUILDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.child, args.precision, args.compiled, args.threads)
        return
    precisions = [args.precision] if args.precision else ["float32", "bf16"]
    results = [compare(p, args.compiled, args.pairs, args.steps, args.threads) for p in precisions]
    print("| precision | ours, tokens/s | transformers | speed ratio | ours, peak MB | transformers | memory ratio |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        speed, memory = row["tokens_per_second"], row["peak_mb"]
        assert isinstance(speed, dict) and isinstance(memory, dict)
        cells = [row["precision"], speed["ours"], speed["transformers"], row["speed_ratio"]]
        cells += [memory["ours"], memory["transformers"], row["memory_ratio"]]
        print("| " + " | ".join(map(str, cells)) + " |")
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"machine": machine(), "shape": SHAPE, "results": results}, indent=1) + "\n")
    print(f"written: {out.name}")


if __name__ == "__main__":
    main()
