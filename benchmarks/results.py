"""What benchmarks share: processes that take turns, the machine they ran on, their JSON, and their table in README.md."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")


def machine(*packages: str) -> dict[str, object]:
    """What the figures hold for: processor, GPU, load, date and versions."""
    import torch

    from smollm2.plan.machine import count_cores

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    features = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    found: dict[str, object] = {"cpu": " ".join([cpu, *features]), "cores": count_cores()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["load"] = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    found["date"] = time.strftime("%Y-%m-%d")
    return found | {name: importlib.metadata.version(name) for name in ("torch", *packages)}


def find_precisions() -> list[str]:
    """Return the formats to compare on this CPU: bf16 only if it has the units, since emulation is 100 times slower."""
    import torch

    from smollm2.runtime.precision import device_features

    return ["float32", "bf16"] if "bf16" in device_features(torch.device("cpu")) else ["float32"]


def publish(script: str, columns: Sequence[str], rows: Sequence[Sequence[object]], **more: object) -> None:
    """Print the table, write `<script>.json`, and put the table between its marks in README.md."""
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows))
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *map(shlex.quote, sys.argv[1:])])
    found = more["machine"]
    assert isinstance(found, dict)
    place = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
    print(table)
    content = {"command": command, **more, "columns": list(columns), "rows": [list(row) for row in rows]}
    Path(script).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    name = Path(script).stem
    text = README.read_text()
    block = f"<!-- {name} -->\n`{command}` on {place}:\n\n{table}\n<!-- end {name} -->"
    marked = re.compile(rf"<!-- {name} -->.*?<!-- end {name} -->", re.DOTALL)
    if not marked.search(text):
        raise SystemExit(f"{README.name} has no marks for {name}")
    README.write_text(marked.sub(lambda _: block, text))
    print(f"written: {name}.json, README.md")


class Contestant:
    """A child process of a benchmark, which does a number of things when asked to and answers with one JSON line."""

    def __init__(self, script: str, *flags: str) -> None:
        command = [sys.executable, script, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, count: int) -> dict[str, Any]:
        """What it says about so many, `seconds` among it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(contestants: dict[str, Contestant], rounds: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """Each one's answers over the rounds, every second round in the opposite order; then all are closed."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(contestants):
            answers[name].append(contestants[name].run(count))
    for contestant in contestants.values():
        contestant.close()
    return answers
