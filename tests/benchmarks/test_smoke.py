"""Every benchmark runs, at a tiny size: the figures mean nothing, the script, its JSON and its table do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, WORDS

from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.plan.arithmetic import flops_per_token

ONE_ROUND = ["--rounds", "1", "--steps", "1", "--threads", "1", "--precision", "float32"]
COMMANDS = {
    "checkpoint": ["--rounds", "1", "--millions", "1"],
    "generate": ["--pairs", "1", "--calls", "1", "--threads", "1", "--precision", "float32", "--batch", "1"],
    "gpu": ["--toy", "--steps", "1", "--attention", "sdpa", "--modes", "eager"],
    "learning": ["--steps", "4", "--every", "2", "--input_file", "input.txt"],
    "memory": ["--repeats", "1", "--vocabulary", "512", "--width", "64", "--tokens", "128"],
    "muon": ["--presets", "nano", "--layers", "1", "--rounds", "1", "--peer_rounds", "1", "--threads", "1"],
    "prepare": ["--megabytes", "0.3", "--rounds", "1", "--no_peer"],
    "reading": ["--tokens", "100000000", "--repeats", "1", "--steps", "2"],
    "scale": ["--presets", "smollm2-135m", "--devices", "2", "16"],
    "train_speed": [*ONE_ROUND, "--modes", "eager", "--batch", "1", "--length", "32"],
}
SLOW = {"generate", "gpu", "learning", "memory", "muon", "prepare", "reading", "train_speed"}
"""Those that take about ten seconds or more."""


def test_every_benchmark_has_a_smoke_test() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"results"}
    assert scripts == set(COMMANDS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS]
)
def test_a_benchmark_runs_at_a_tiny_size_and_writes_its_json_and_its_table(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", folder, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    (tmp_path / "input.txt").write_text(WORDS * 40, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(folder / f"{name}.py"), *COMMANDS[name]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert result["rows"] and all(len(row) == len(result["columns"]) for row in result["rows"])
    assert not [row for row in result["rows"] if "does not run here" in row]
    page = (folder / "README.md").read_text(encoding="utf-8")
    marked = page[page.index(f"<!-- {name} -->") : page.index(f"<!-- end {name} -->")]
    assert f"`python benchmarks/{name}.py {COMMANDS[name][0]}" in marked
    assert all(str(cell) in marked for cell in result["rows"][0])


@pytest.mark.parametrize(
    ("preset", "billions"), [("smollm2-135m", 1.019), ("smollm2-360m", 2.548), ("smollm2-1.7b", 10.87), ("", 0.940)]
)
def test_mfu_counts_the_flops_of_the_table(preset: str, billions: float) -> None:
    """6 N_nonembedding + 6 V d + 6 L d_attention T at T = 2,048."""
    config = load_config(preset=preset) if preset else Config.model_validate({})
    assert flops_per_token(config.model, 2048) / 1e9 == pytest.approx(billions, rel=1e-3)
