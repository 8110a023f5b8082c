"""Join the results of scripts/gpu_suite.sh, tests.xml and benchmark.json in a folder, to gpu_suite.json and gpu_suite.md."""

import json
import platform
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_tests(path: Path) -> list[dict[str, Any]]:
    """Return each test of pytest's XML file: its file, name, outcome, seconds, and why if it did not pass."""
    tests = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = {"failure": "failed", "error": "failed"}.get(child.tag, child.tag)
                reason = (child.get("message") or "").splitlines()[0][:200] if child.get("message") else ""
        file = case.get("classname", "").rpartition(".")[2]
        seconds = float(case.get("time", "0"))
        test = {"file": file, "name": case.get("name", ""), "outcome": outcome, "seconds": seconds, "reason": reason}
        tests.append(test)
    return tests


def describe_device() -> dict[str, object]:
    """Return what the results hold for."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"gpu": gpu, "torch": str(torch.__version__), "python": platform.python_version()}
    return {**found, "date": time.strftime("%Y-%m-%d"), "rehearsal": gpu is None}


def draw_table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def render(result: dict[str, Any]) -> str:
    """Return the Markdown page: the tests by file and parameter-free name, then the benchmark."""
    device = result["device"]
    title = "Rehearsal on a CPU: the figures mean nothing" if device["rehearsal"] else f"GPU suite on {device['gpu']}"
    parts = [f"# {title}\n\ntorch {device['torch']}, Python {device['python']}, {device['date']}"]
    if "tests" in result:
        groups: dict[tuple[str, str], Counter[str]] = {}
        for test in result["tests"]:
            name = re.sub(r"\[.*", "", test["name"]).removeprefix("test_").replace("_", " ")
            groups.setdefault((test["file"], name), Counter())[test["outcome"]] += 1
        outcomes = ("passed", "failed", "skipped")
        rows = [
            [file, name, *(counts[outcome] or "" for outcome in outcomes)] for (file, name), counts in groups.items()
        ]
        parts.append("## Tests\n\n" + draw_table(["file", "test", *outcomes], rows))
        bad = [[test["name"], test["reason"]] for test in result["tests"] if test["outcome"] == "failed"]
        if bad:
            parts.append("### Failed\n\n" + draw_table(["test", "why"], bad))
    if "benchmark" in result:
        benchmark = result["benchmark"]
        peak = benchmark["peak_flops"]
        shown = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown"
        note = f"MFU = {benchmark['mfu_formula']}; peak = {shown}."
        parts.append("## Speed\n\n" + draw_table(benchmark["columns"], benchmark["rows"]) + f"\n\n{note}")
    return "\n\n".join(parts) + "\n"


def main(folder: Path) -> int:
    """Write both files; return 1 if a part is missing or a test failed."""
    result: dict[str, Any] = {"device": describe_device()}
    if (folder / "tests.xml").exists():
        result["tests"] = read_tests(folder / "tests.xml")
    if (folder / "benchmark.json").exists():
        result["benchmark"] = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    (folder / "gpu_suite.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = render(result)
    (folder / "gpu_suite.md").write_text(page, encoding="utf-8")
    print(page)
    print(f"written: {folder / 'gpu_suite.json'}, {folder / 'gpu_suite.md'}")
    return int(len(result) == 1 or any(test["outcome"] == "failed" for test in result.get("tests", ())))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
