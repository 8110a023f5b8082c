"""What all benchmarks share: the machine they ran on, their JSON, and their table in README.md."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).with_name("README.md")


def machine(*packages: str) -> dict[str, object]:
    """What the figures hold for: processor, GPU, load, date and versions."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    features = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    found: dict[str, object] = {"cpu": " ".join([cpu, *features]), "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["load"] = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    found["date"] = time.strftime("%Y-%m-%d")
    return found | {name: importlib.metadata.version(name) for name in ("torch", *packages)}


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
