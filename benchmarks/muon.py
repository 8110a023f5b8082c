"""Time one step of our Muon against `torch.optim.Muon`, and its share of a whole optimizer step.

Both optimize copies of one model's matrices and take turns. On a CPU without bf16 units torch's takes half a minute for one
step of `micro`, so its rounds are counted apart.

    python benchmarks/muon.py                              # nano and micro
    python benchmarks/muon.py --presets nano --layers 1    # a part of one
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from results import machine, publish

COLUMNS = ["preset", "dtype", "ours, ms", "torch.optim.Muon, ms", "ratio", "whole step, ms", "share of ours"]


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(preset: str, layers: int | None, rounds: int, peer_rounds: int) -> dict[str, Any]:
    """Return the median seconds of our step, of torch's, and of a whole optimizer step with ours."""
    import torch

    from smollm2.config.reading import load_config
    from smollm2.runtime.device import start_runtime
    from smollm2.training.optim import build_optimizers
    from smollm2.training.setup import build_model
    from smollm2.training.step import train_step

    model_options = {"num_hidden_layers": layers} if layers else {}
    config = load_config(preset=preset, model=model_options, training={"optimizer": "muon"})
    runtime = start_runtime(config.training)
    model = build_model(config, runtime)
    optimizers = build_optimizers(model, config.training)
    ours: Any = optimizers["muon"]
    group = ours.param_groups[0]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    named = list(zip(group["param_names"], copies, strict=True))
    theirs = torch.optim.Muon(named, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    t = config.training
    ids = torch.randint(0, config.model.vocab_size, (t.batch_size, t.sequence_length + 1), device=runtime.device)
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * t.gradient_accumulation_steps

    def synchronized(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()

        return run

    whole = synchronized(lambda: train_step(model, optimizers, batch, runtime, learning_rate=1e-3, max_grad_norm=1.0))
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "whole": []}
    for number in range(rounds + 1):
        times["whole"].append(measure_seconds(whole))
        for p, copy in zip(group["params"], copies, strict=True):
            p.grad = torch.randn_like(p)
            copy.grad = p.grad.clone()
        times["ours"].append(measure_seconds(synchronized(ours.step)))
        if number < peer_rounds:
            times["theirs"].append(measure_seconds(synchronized(theirs.step)))
        ours.zero_grad()
    medians = {name: statistics.median(seconds[1:] or seconds) for name, seconds in times.items()}
    return medians | {"dtype": str(ours.dtype).removeprefix("torch.")}


def main() -> None:
    """Compare on each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "micro"])
    parser.add_argument("--layers", type=int, help="blocks of the model; the preset's by default")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument(
        "--peer_rounds", type=int, default=2, help="of torch.optim.Muon; the first counts only if alone"
    )
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    found = machine()
    rows, results = [], []
    for preset in args.presets:
        result = compare(preset, args.layers, args.rounds, args.peer_rounds)
        results.append({"preset": preset, **result})
        times = [1000 * result["ours"], 1000 * result["theirs"]]
        ratio, share = result["theirs"] / result["ours"], result["ours"] / result["whole"]
        row = [preset, result["dtype"], f"{times[0]:.1f}", f"{times[1]:.0f}", f"{ratio:.1f}"]
        rows.append([*row, f"{1000 * result['whole']:.0f}", f"{share:.0%}"])
    publish(__file__, COLUMNS, rows, machine=found, results=results)


if __name__ == "__main__":
    main()
