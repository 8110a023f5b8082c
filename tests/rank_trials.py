"""What several ranks go through: every way to share a model resumed by every other, and ranks that are killed.

    PYTHONPATH=.:tests python tests/rank_trials.py matrix FOLDER
    PYTHONPATH=.:tests python tests/rank_trials.py kills FOLDER --kills 20 --seed 1
    PYTHONPATH=.:tests python tests/rank_trials.py measure FOLDER

prints one JSON object a trial, and one at the end. tests/training/test_sharding.py runs small forms of both.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import metrics, outcome, write_tiny
from two_ranks import Ended, Ranks, start_ranks

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.cli.main import main
from smollm2.config.reading import load_config
from smollm2.plan.machine import cpu_class
from smollm2.plan.scale import Cluster, cluster_memory
from smollm2.storage.run_folder import RANKS, find_checkpoint
from smollm2.training import actions, loop

STEPS = 12


@dataclass(frozen=True)
class World:
    """How many ranks train, how they share the model, and how many are on a machine (0: all)."""

    ranks: int
    sharding: str
    per_machine: int = 0

    def start(self, folder: Path, save_dir: str, *flags: str, before: Callable[[], object] = int) -> Ranks:
        """Start to train in `folder` as the user does; `before` is called on each rank at first."""

        def work(rank: int) -> int:
            before()
            words = ["train", "--config", "config.yaml", "--disable_wandb", "--save_dir", save_dir]
            return main([*words, "--training.sharding", self.sharding, *flags])

        return start_ranks(work, folder, self.ranks, self.per_machine)

    def train(self, folder: Path, save_dir: str, *flags: str, before: Callable[[], object] = int) -> list[Ended]:
        """`start`, waited for."""
        return self.start(folder, save_dir, *flags, before=before).wait()


ONE = World(1, "none")
WORLDS = {
    "two copies": World(2, "none"),
    "one part": World(1, "full"),
    "two parts": World(2, "full"),
    "two machines with one rank": World(2, "hybrid", 1),
    "four copies": World(4, "none"),
    "four parts": World(4, "full"),
    "two machines with two parts": World(4, "hybrid", 2),
}


def trained(folder: Path, world: World, save_dir: str, *flags: str) -> Path:
    """The run folder of a whole run."""
    ended = world.train(folder, save_dir, *flags)
    assert [rank.code for rank in ended] == [0] * world.ranks, ended
    return folder / save_dir


def column(folder: Path, name: str = "loss") -> list[float]:
    """A column of metrics.jsonl."""
    return [float(row[name]) for row in metrics(folder) if name in row]


def differences(mine: Path, theirs: Path, name: str = "loss") -> list[float]:
    """The relative differences of a column."""
    return [abs(a / b - 1) for a, b in zip(column(mine, name), column(theirs, name), strict=True)]


def forget_the_end(folder: Path) -> None:
    """Remove the checkpoint of the last step."""
    path = find_checkpoint(folder, STEPS)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def try_all_resumes(folder: Path) -> Iterator[dict[str, object]]:
    """Every layout resumes the file and the folder that every layout wrote, from step 8 of 12."""
    write_tiny(folder)
    worlds = {"one": ONE, **WORLDS}
    whole = trained(folder, ONE, "whole")
    for form in ("file", "folder"):
        for first, writer in worlds.items():
            saved = folder / "saved"
            forget_the_end(trained(folder, writer, "saved", "--training.checkpoints", form))
            for then, reader in worlds.items():
                shutil.copytree(saved, folder / "run")
                ended = reader.train(folder, "run", "--resume", "auto")
                codes = [rank.code for rank in ended]
                found = max(differences(folder / "run", whole)) if not any(codes) else float("inf")
                yield {"form": form, "first": first, "then": then, "codes": codes, "largest difference": found}
                shutil.rmtree(folder / "run")
            shutil.rmtree(saved)


def try_kills(folder: Path, kills: int, seed: int, form: str = "folder") -> Iterator[dict[str, object]]:
    """Kill one of two ranks at random moments, resume, and compare the finished run with an undisturbed one.

    Not before they have found one another: until then only a launcher can end the other one.
    """
    write_tiny(folder)
    world, chance = WORLDS["two parts"], random.Random(seed)
    flags = ("--training.checkpoints", form, "--training.save_interval", "2", "--training.rank_timeout", "20")
    began = time.monotonic()
    expected = outcome(trained(folder, world, "whole", *flags), STEPS)
    seconds = time.monotonic() - began
    number = 0
    while number < kills:
        shutil.rmtree(folder / "run", ignore_errors=True)
        finished = False
        while not finished:
            shutil.rmtree(folder / "run" / RANKS, ignore_errors=True)
            ranks = world.start(folder, "run", "--resume", "auto", *flags)
            victim, moment = chance.randrange(world.ranks), chance.uniform(0, seconds)
            if number < kills:
                number += 1
                while len(list((folder / "run" / RANKS).glob("*.json"))) < world.ranks:
                    time.sleep(0.01)
                time.sleep(moment)
                os.kill(ranks.pids[victim], signal.SIGKILL)
            codes = [rank.code for rank in ranks.wait()]
            finished = codes == [0] * world.ranks
            yield {"kill": number, "rank": victim, "after": round(moment, 3), "codes": codes}
        yield {"finished": True, "bit-identical": outcome(folder / "run", STEPS) == expected}


LARGE = """
model: {hidden_size: 640, intermediate_size: 1712, num_hidden_layers: 12, num_attention_heads: 10, num_key_value_heads: 10,
  max_position_embeddings: 128, norm: rmsnorm}
training: {train_steps: 6, batch_size: 2, gradient_accumulation_steps: 2, precision: float32, log_interval: 1, eval_interval: 0,
  save_interval: 2, sample_tokens: 0, diagnostics_interval: 0, warmup_steps: 1, checkpoints: folder, rank_timeout: 300}
data: {tokenizer: bytes, validation_fraction: 0}
"""


def measure_saves_and_memory(folder: Path) -> Iterator[dict[str, object]]:
    """Two ranks share out a model of 60M parameters: the stall of a save beside torch.save, and the memory beside the plan."""
    write_tiny(folder, config=LARGE)

    def work(rank: int) -> int:
        save, found = actions.save, list[float]()

        def timed(*arguments: Any, **named: Any) -> None:
            began = time.perf_counter()
            save(*arguments, **named)
            found.append(time.perf_counter() - began)

        loop.save = timed  # type: ignore[attr-defined]
        words = [
            "train",
            "--config",
            "config.yaml",
            "--disable_wandb",
            "--save_dir",
            "run",
            "--training.sharding",
            "full",
        ]
        code = main(words)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(f"notes_{rank}.json").write_text(json.dumps({"rank": rank, "stalls": found, "peak memory": peak}))
        return code

    ended = start_ranks(work, folder, 2).wait(600)
    assert [rank.code for rank in ended] == [0, 0], ended
    yield from (json.loads((folder / f"notes_{rank}.json").read_text()) for rank in range(2))
    state = load_checkpoint(find_checkpoint(folder / "run", 6))
    began = time.perf_counter()
    with (folder / "whole.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    config = load_config(folder / "config.yaml").with_vocab_size(257).with_training(sharding="full")
    planned = cluster_memory(config, cpu_class(os.environ), Cluster(1, 2), "full").total
    yield {"torch.save": time.perf_counter() - began, "parameters": sum(t.numel() for t in state["model"].values())}
    yield {"planned memory of a device": planned}


def command() -> None:
    """Print each trial as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["matrix", "kills", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found = []
    trials = {
        "matrix": lambda: try_all_resumes(args.folder),
        "kills": lambda: try_kills(args.folder, args.kills, args.seed),
        "measure": lambda: measure_saves_and_memory(args.folder),
    }
    for one in trials[args.trial]():
        print(json.dumps(one), flush=True)
        found.append(one)
    if args.trial == "matrix":
        print(
            json.dumps({"resumes": len(found), "largest": max(float(str(one["largest difference"])) for one in found)})
        )


if __name__ == "__main__":
    command()
