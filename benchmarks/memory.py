"""Memory and time of the loss at SmolLM2's vocabulary: ours, `F.linear_cross_entropy`, and the plain form.

Forward and backward of output head and cross-entropy alone, each form in a process of its own; memory is what the peak
rose by over the inputs (hidden states, weight and its gradient are in all of them).

    python benchmarks/memory.py
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from results import find_precisions, machine, publish


@dataclass(frozen=True)
class Sizes:
    """The output head: hidden states (tokens, width) and a weight (vocabulary, width)."""

    vocabulary: int
    width: int
    tokens: int


def run_form(name: str, precision: str, sizes: Sizes, repeats: int) -> dict[str, float]:
    """Median seconds and the rise of the peak, of one form, in this process."""
    import torch
    import torch.nn.functional as F

    from smollm2.model.loss import next_token_loss

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.width).to(dtype).requires_grad_()
    weight = (torch.randn(sizes.vocabulary, sizes.width) * 0.02).requires_grad_()
    labels = torch.randint(0, sizes.vocabulary, (sizes.tokens,))
    weight.grad = torch.zeros_like(weight)
    torch.autograd.backward((hidden[:8] @ weight[:8].to(dtype).T).sum())  # the libraries' own buffers

    def plain() -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.to(dtype).T).float(), labels, reduction="sum")

    def linear() -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        return F.linear_cross_entropy(hidden, weight.to(dtype), labels, reduction="sum", options=options)

    def ours() -> torch.Tensor:
        return next_token_loss(hidden, weight, labels)[0]

    forms: dict[str, Callable[[], torch.Tensor]] = {"plain": plain, "linear_cross_entropy": linear, "ours": ours}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        loss = forms[name]()
        torch.autograd.backward(loss)
        seconds.append(time.perf_counter() - started)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"megabytes": rise, "seconds": statistics.median(seconds), "loss": float(loss.detach()) / sizes.tokens}


def main() -> None:
    """Every form in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = Sizes(args.vocabulary, args.width, args.tokens)
    if args.child:
        name, precision = args.child
        print(json.dumps(run_form(name, precision, sizes, args.repeats)))
        return
    found, rows, results = machine(), [], []
    flags = ["--repeats", str(args.repeats)]
    for name, value in asdict(sizes).items():
        flags += [f"--{name}", str(value)]
    for precision in find_precisions():
        figures = {}
        for name in ("plain", "linear_cross_entropy", "ours"):
            command = [sys.executable, __file__, *flags, "--child", name, precision]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append([precision, name, "does not run here", "", "", done.stderr.strip().splitlines()[-1][:80]])
                continue
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            one, plain = figures[name], figures["plain"]
            share = f"{one['megabytes'] / plain['megabytes']:.2f}"
            rows.append(
                [precision, name, round(one["megabytes"]), share, f"{one['seconds']:.2f}", f"{one['loss']:.4f}"]
            )
        results.append({"precision": precision, **figures})
    columns = ["precision", "form", "MB over the inputs", "of plain", "seconds", "mean loss"]
    publish(__file__, columns, rows, machine=found, shape=asdict(sizes), results=results)


if __name__ == "__main__":
    main()
