"""Tokenizing a corpus: `smollm2 prepare` against `datasets.map`; and how fast the tokens are then read.

The corpus is real text, sources and docstrings of Python's standard library, repeated with a number in each document, as
JSONL. Both sides run as processes of their own, in turns, from the file to tokens on disk, with the same tokenizer; ours are
compared with those of the library `tokenizers`. Peak memory is that of all their processes. Needs the extra `benchmark`.

    python benchmarks/prepare.py --tokenizer FOLDER
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from results import machine, publish

PEER = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer

corpus, tokenizer_folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
rows = load_dataset("json", data_files=corpus, split="train", cache_dir=out)
def encode(batch):
    return {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}
rows = rows.map(encode, batched=True, num_proc=2, remove_columns=["text"])
rows.save_to_disk(f"{out}/saved")
"""

OURS = "import sys; from smollm2.cli.main import main; sys.exit(main(sys.argv[1:]))"


def write_corpus(path: Path, size: int) -> None:
    """Write about `size` bytes of documents as JSONL, each different from all others."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [
        p.read_text(encoding="utf-8", errors="ignore")
        for p in sorted(library.rglob("*.py"))
        if "site-packages" not in p.parts
    ]
    texts = [text for text in texts if text.strip() and "\ufffd" not in text]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            text = f"# {number}\n{texts[number % len(texts)]}"
            file.write(json.dumps({"text": text}) + "\n")
            written, number = written + len(text.encode()), number + 1


def make_tokenizer(corpus: Path, folder: Path) -> Path:
    """Train a BPE on the first documents and save it."""
    from smollm2.data.tokenizer import train_tokenizer

    with corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(300), file, strict=False)]
    train_tokenizer(texts, 4096).save(folder)
    return folder


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command; return its seconds and the peak of the memory of all its processes in MB, shared pages once each."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        while not done.wait(0.1):
            try:
                found = [root, *root.children(recursive=True)]
                peak[0] = max(peak[0], sum(one.memory_full_info().pss for one in found) / 1e6)
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    _, errors = process.communicate()
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(errors)
    return {"seconds": time.perf_counter() - started, "megabytes": peak[0]}


def hash_ours(cache: Path) -> str:
    """Return a hash of all ids, with an end of text after each document."""
    from smollm2.data.store import open_tokens

    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    store = open_tokens(folder)
    assert store is not None
    digest = hashlib.sha256()
    for first in range(0, len(store.train), 2**20):
        digest.update(store.train[first : first + 2**20].astype("<u4").tobytes())
    return digest.hexdigest()


def hash_library(corpus: Path, tokenizer_folder: Path) -> str:
    """Return the same hash of what the library `tokenizers` gives."""
    import numpy as np
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    digest, end = hashlib.sha256(), json.loads((tokenizer_folder / "tokenizer_config.json").read_text())["eos_token"]

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        with corpus.open(encoding="utf-8") as file:
            for line in file:
                batch.append(json.loads(line)["text"])
                if len(batch) == 64:
                    yield batch
                    batch = []
        yield batch

    for batch in batches():
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            digest.update(np.array([*encoding.ids, backend.token_to_id(end)], "<u4").tobytes())
    return digest.hexdigest()


def main() -> None:
    """Take turns, compare the tokens, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder, such as SmolLM2's; default: a BPE trained on the corpus"
    )
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_peer", action="store_true", help="only ours")
    args = parser.parse_args()
    found, same = machine(), True
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, int(args.megabytes * 1e6))
        tokenizer = args.tokenizer.resolve() if args.tokenizer else make_tokenizer(corpus, folder / "tokenizer")
        ours = ["prepare", "--preset", "nano", "--input_file", str(corpus), "--data.tokenizer", str(tokenizer)]
        ours += ["--data.validation_fraction", "0", "--data.cache_dir", "ours", "--training.save_dir", "run"]
        commands = {"smollm2 prepare": [sys.executable, "-c", OURS, *ours]}
        if not args.no_peer:
            commands["datasets.map, num_proc=2"] = [sys.executable, "-c", PEER, str(corpus), str(tokenizer), "theirs"]
        for number in range(args.rounds):
            for side in commands if number % 2 == 0 else reversed(commands):
                shutil.rmtree(folder / "ours", ignore_errors=True)
                shutil.rmtree(folder / "theirs", ignore_errors=True)
                results.setdefault(side, []).append(measure(commands[side], folder))
        if not (folder / "ours").exists():
            measure(commands["smollm2 prepare"], folder)
        same = hash_ours(folder / "ours") == hash_library(corpus, tokenizer)
        size = corpus.stat().st_size / 1e6
    rows: list[list[Any]] = []
    base = statistics.median(one["seconds"] for one in results["smollm2 prepare"])
    for side, measured in results.items():
        seconds = statistics.median(one["seconds"] for one in measured)
        memory = max(one["megabytes"] for one in measured)
        rows.append([side, f"{seconds:.1f}", f"{size / seconds:.1f}", f"{memory:.0f}", f"{seconds / base:.2f}"])
    columns = ["", "seconds", "MB/s", "peak MB", "times ours"]
    print(f"the tokens are {'' if same else 'NOT '}those of the library tokenizers")
    publish(__file__, columns, rows, machine=found, results=results, same_tokens=same, megabytes=size)


if __name__ == "__main__":
    main()
