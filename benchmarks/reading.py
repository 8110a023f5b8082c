"""Reading tokens: how fast batches are made on one core, and how long a large store takes to open.

A trillion tokens are sparse files on disk: they are opened and read like any others. nano's training speed is measured in
the same run, by training steps on this machine.

    python benchmarks/reading.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import machine, publish

SHARDS = 2048
LENGTH, BATCH = 2048, 64


def make_store(folder: Path, tokens: int, shards: int) -> Path:
    """Write a store of so many tokens, all zero, in sparse files."""
    from smollm2.data.shards import HEADER, HEADER_SIZE, MAGIC, VERSION, Shard
    from smollm2.data.store import INDEX, Index, Statistics

    folder.mkdir()
    count = tokens // shards
    for number in range(shards):
        with (folder / f"train-{number:05d}.bin").open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, 2, count, 0, 49_152, bytes(32), bytes(32)))
            file.truncate(HEADER_SIZE + 2 * count)
    for split in ("train", "validation"):
        (folder / f"{split}.ends").touch()
    counts = dict.fromkeys(
        ("documents", "blank_documents", "unknown_bytes", "unknown_documents", "validation_tokens"), 0
    )
    statistics_of_all = Statistics(characters=1, bytes=1, tokens=count * shards, train_tokens=count * shards, **counts)
    listed = [Shard(f"train-{number:05d}.bin", count, 0, "0" * 64) for number in range(shards)]
    index = Index(folder.name, 49_152, "0" * 64, 0, 0, statistics_of_all, {}, listed, [])
    (folder / INDEX).write_text(index.to_json())
    return folder


def time_median(work: Callable[[], object], repeats: int) -> float:
    """Return the median of the seconds that `work` takes."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def open_and_read(folder: Path, step: int, rows: int) -> None:
    """Open a store and make one batch."""
    from smollm2.data.batches import Batches
    from smollm2.data.store import open_tokens
    from smollm2.data.windows import Windows

    store = open_tokens(folder)
    assert store is not None
    Batches([Windows(store.train, LENGTH, LENGTH, 49_152)], 1337, BATCH).read(step, 0, rows)


def measure_nano(steps: int) -> float:
    """Return the tokens per second of nano's training steps, on all cores."""
    from smollm2 import load_config, train

    with tempfile.TemporaryDirectory() as name:
        seconds: list[float] = []
        flags: dict[str, Any] = {
            "data.input": f"{name}/input.txt",
            "training.save_dir": f"{name}/run",
            "training.train_steps": steps,
        }
        (Path(name) / "input.txt").write_text("".join(f"Line {i} of a text to train on.\n" for i in range(50_000)))
        flags |= {"training.eval_interval": 0, "training.sample_tokens": 0}
        config = load_config(preset="nano", **flags)
        train(config, quiet=True, on_step=lambda step, result: seconds.append(result.seconds))
    return config.global_batch_size * config.training.sequence_length / statistics.median(seconds[len(seconds) // 2 :])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**12)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60, help="of nano")
    args = parser.parse_args()
    from smollm2.data.batches import Batches
    from smollm2.data.store import open_tokens
    from smollm2.data.windows import Windows

    with tempfile.TemporaryDirectory() as name:
        large = make_store(Path(name) / "large", args.tokens, SHARDS)
        gigabyte = make_store(Path(name) / "gigabyte", min(args.tokens, 5 * 10**8), 64)
        first = time_median(lambda: open_and_read(large, min(10**6, args.tokens // 10**6), BATCH), args.repeats)
        opened = time_median(lambda: open_tokens(gigabyte), args.repeats)
        store = open_tokens(gigabyte)
        assert store is not None
        rates = {}
        for length, batch in ((LENGTH, BATCH), (128, 16)):
            batches = Batches([Windows(store.train, length, length, 49_152)], 1337, batch)
            numbers = iter(range(10**6))
            seconds = time_median(lambda b=batches, n=numbers, rows=batch: b.read(next(n), 0, rows), 40 * args.repeats)  # type: ignore[misc]
            rates[length] = batch * length / seconds
    nano = measure_nano(args.steps)
    rows = [
        [f"first batch at step 1,000,000 of {args.tokens:,} tokens, opening included", f"{1000 * first:.1f} ms"],
        ["opening 1 GB of tokens", f"{1000 * opened:.1f} ms"],
        *(
            [f"batches of windows of {length:,} tokens, one core", f"{rate / 1e6:.1f} M tokens/s"]
            for length, rate in rates.items()
        ),
        ["nano's training", f"{nano:,.0f} tokens/s"],
        ["nano's batches, against its training", f"{rates[128] / nano:.0f} times as fast"],
    ]
    results = {"first": first, "opened": opened, "rates": rates, "nano": nano, "sizes": vars(args)}
    publish(__file__, ["", "measured"], rows, machine=machine(), results=results)


if __name__ == "__main__":
    main()
