"""Training speed and peak memory: this package against transformers' LlamaForCausalLM in a plain loop, in its Trainer
with the defaults that a newcomer gets (float32 on a CPU), and litgpt.

All take the same shape, data, threads, batch and, but for the Trainer, precision, optimizer and clipping, each in a
process of its own. The processes take turns, so that a busy machine slows all; a ratio is the median over the rounds.

    python benchmarks/train_speed.py            # prints a table, writes train_speed.json and README.md
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from results import Contestant, find_precisions, machine, publish, take_turns

if TYPE_CHECKING:
    from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
LEARNING_RATE, MAX_GRAD_NORM = 3e-4, 1.0


@dataclass(frozen=True)
class Task:
    """What every contestant does: `batch` sequences of `length` tokens a step, in one precision, compiled or not."""

    precision: str
    compiled: bool
    batch: int = 8
    length: int = 256

    def flags(self) -> list[str]:
        """Return the flags that tell a child process the same."""
        sizes = ["--batch", str(self.batch), "--length", str(self.length)]
        return ["--precision", self.precision, *sizes, *(["--compiled"] if self.compiled else [])]

    def read(self) -> "tuple[Tensor, Tensor]":
        """Return the input ids and the labels, each (batch, length); labels[t] is the token after input_ids[t]."""
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, SHAPE["vocab_size"], (self.batch, self.length + 1), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def build_ours(task: Task) -> Callable[[], float]:
    """One update of this package, as `train` makes it."""

    from smollm2.config.schema import ModelConfig, TrainingConfig
    from smollm2.model.attention import choose_backend
    from smollm2.model.transformer import SmolLM2
    from smollm2.runtime.device import compile_blocks, start_runtime
    from smollm2.runtime.precision import device_features
    from smollm2.training.optim import build_optimizers
    from smollm2.training.step import train_step as update

    config = TrainingConfig.model_validate({"precision": task.precision, "learning_rate": LEARNING_RATE})
    runtime = start_runtime(config)
    model = SmolLM2(ModelConfig(norm="rmsnorm", **SHAPE))
    backend = choose_backend("auto", runtime.device.type, runtime.precision.dtype, device_features(runtime.device))
    model.model.attention_backend = backend
    if task.compiled:
        compile_blocks(model.model.layers)
    optimizers = build_optimizers(model, config)
    batch = [task.read()]

    def step() -> float:
        result = update(model, optimizers, batch, runtime, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
        return result.loss

    return step


def build_transformers(task: Task) -> Callable[[], float]:
    """One update of a plain loop: autocast, the model's own loss, torch's clipping and fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1337)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5))
    if task.compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    input_ids, labels = task.read()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
            loss = model(input_ids=input_ids, labels=labels, shift_labels=labels).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def build_litgpt(task: Task) -> Callable[[], float]:
    """One update of litgpt's model with its own loss, in autocast as its bf16-mixed is; the head tied as in the others."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    torch.manual_seed(1337)
    config = Config(
        block_size=task.length,
        vocab_size=SHAPE["vocab_size"],
        padded_vocab_size=SHAPE["vocab_size"],
        n_layer=SHAPE["num_hidden_layers"],
        n_head=SHAPE["num_attention_heads"],
        n_query_groups=SHAPE["num_key_value_heads"],
        n_embd=SHAPE["hidden_size"],
        intermediate_size=SHAPE["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    model.apply(model._init_weights)
    if task.compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    input_ids, labels = task.read()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
            loss = chunked_cross_entropy(model(input_ids), labels, chunk_size=0)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def serve_trainer(task: Task, threads: int) -> None:
    """Child process: transformers' Trainer with its defaults, which waits before a step until it may continue."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(threads)
    torch.manual_seed(1337)
    ids, _ = task.read()
    before = peak_megabytes()

    class Turns(TrainerCallback):
        left, started = 0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.left:
                line = sys.stdin.readline()
                if not line:
                    os._exit(0)
                self.left, self.started = int(line), time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if not self.left:
                seconds = time.perf_counter() - self.started
                answer = {"seconds": seconds, "loss": float("nan"), "peak_mb": peak_megabytes(), "before_mb": before}
                print(json.dumps(answer), file=ANSWERS, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5)),
            args=TrainingArguments(folder, max_steps=10**6, report_to="none", save_strategy="no", disable_tqdm=True),
            train_dataset=[{"input_ids": ids[n % task.batch], "labels": ids[n % task.batch]} for n in range(8000)],
            callbacks=[Turns()],
        ).train()


ANSWERS = sys.stdout
BUILDERS = {"ours": build_ours, "transformers": build_transformers, "litgpt": build_litgpt}
PEERS = ["transformers", "litgpt", "trainer"]


def serve(name: str, task: Task, threads: int) -> None:
    """Child process: for each number read from standard input make that many updates and answer with one JSON line."""
    import torch

    torch.set_num_threads(threads)
    step = BUILDERS[name](task)
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


def compare(task: Task, peers: list[str], rounds: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """Rounds in which ours and each peer take a turn; one row of medians for each peer."""
    names = ["ours", *peers]
    flags = [*task.flags(), "--threads", str(threads)]
    contestants = {name: Contestant(__file__, "--child", name, *flags) for name in names}
    for contestant in contestants.values():
        contestant.run(3)
    runs = take_turns(contestants, rounds, steps)
    rates = {name: [steps * task.batch * task.length / run["seconds"] for run in found] for name, found in runs.items()}
    memory = {name: found[-1]["peak_mb"] for name, found in runs.items()}
    rows = []
    for peer in peers:
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[peer], strict=True)]
        rows.append(
            {
                "precision": task.precision,
                "compiled": task.compiled,
                "peer": peer,
                "tokens_per_second": [round(statistics.median(rates[name])) for name in ("ours", peer)],
                "speed_ratio": round(statistics.median(ratios), 3),
                "speed_ratios": [round(ratio, 3) for ratio in ratios],
                "peak_mb": [round(memory[name]) for name in ("ours", peer)],
                "memory_ratio": round(memory["ours"] / memory[peer], 3),
            }
        )
    return rows


def main() -> None:
    """Run the comparison, or one child of it."""
    from smollm2.plan.machine import count_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="updates in one turn")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument(
        "--precision", choices=["float32", "bf16"], nargs="+", help="default: float32, and bf16 if the CPU computes it"
    )
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=PEERS, help="those not installed are left out")
    parser.add_argument("--modes", choices=["eager", "compiled"], nargs="+", default=["eager", "compiled"])
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--child", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        task = Task(args.precision[0], args.compiled, args.batch, args.length)
        if args.child == "trainer":
            sys.stdout = sys.stderr
            serve_trainer(task, args.threads)
        else:
            serve(args.child, task, args.threads)
        return
    installed = [
        peer for peer in args.peers if importlib.util.find_spec("litgpt" if peer == "litgpt" else "transformers")
    ]
    found = machine("transformers", *(["litgpt"] if "litgpt" in installed else []))
    results: list[dict[str, Any]] = []
    for precision in args.precision or find_precisions():
        for mode in args.modes:
            # The Trainer's defaults are float32 and eager: it is compared with what ours takes by itself here.
            peers = [peer for peer in installed if peer != "trainer" or mode == "eager"]
            if peers:
                task = Task(precision, mode == "compiled", args.batch, args.length)
                results += compare(task, peers, args.rounds, args.steps, args.threads)
    rows = []
    for row in results:
        mode = "compiled" if row["compiled"] else "eager"
        against = "Trainer, its defaults (float32)" if row["peer"] == "trainer" else row["peer"]
        rows.append(
            [
                row["precision"],
                mode,
                against,
                *row["tokens_per_second"],
                row["speed_ratio"],
                *row["peak_mb"],
                row["memory_ratio"],
            ]
        )
    columns = [
        "ours in",
        "mode",
        "against",
        "ours, tokens/s",
        "theirs",
        "speed ratio",
        "ours, peak MB",
        "theirs",
        "memory ratio",
    ]
    publish(__file__, columns, rows, machine=found, shape=SHAPE, results=results)


if __name__ == "__main__":
    main()
