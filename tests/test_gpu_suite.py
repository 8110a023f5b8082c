"""scripts/gpu_suite.sh: the packages that a bare machine needs, and the whole script on a CPU at toy size."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from runs import ROOT

SCRIPT = ROOT / "scripts" / "gpu_suite.sh"


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(SCRIPT), *flags], env=given, capture_output=True, text=True, timeout=1200)


def find_requirements(names: set[str], *, without: frozenset[str] = frozenset()) -> set[str]:
    """The installed packages that `names` need, themselves included, by their normalized names."""
    found: set[str] = set()
    left = set(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found or name in without:
            continue
        found.add(name)
        requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        left |= {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    return found


def test_the_wheels_to_carry_are_all_that_the_package_and_the_tests_need_besides_torch() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {Requirement(text).name for text in declared} | {"pytest", "pytest-timeout", "psutil"}
    from_torch = frozenset(find_requirements({"torch"}))
    listed = {line.partition("==")[0].lower() for line in run("--list").stdout.splitlines()}
    assert listed >= find_requirements(names - {"torch"}, without=from_torch)


def test_an_unknown_option_is_refused() -> None:
    done = run("--everything")
    assert done.returncode == 2 and '"--everything" is not an option' in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run scripts/gpu_suite.sh itself")
def test_the_suite_rehearses_on_a_cpu_and_writes_one_json_file_and_one_table(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))
    assert result["device"]["rehearsal"]
    outcomes = [test["outcome"] for test in result["tests"]]
    assert outcomes.count("passed") > 20 and "failed" not in outcomes
    assert all(test["reason"] for test in result["tests"] if test["outcome"] == "skipped")
    assert {row["shape"] for row in result["benchmark"]["results"]} == {"toy"}
    page = (tmp_path / "gpu_suite.md").read_text(encoding="utf-8")
    assert page.startswith("# Rehearsal on a CPU") and "## Tests" in page and "| toy | sdpa | no |" in page
