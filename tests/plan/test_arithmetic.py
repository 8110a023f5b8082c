"""Arithmetic against figures that were counted elsewhere: transformers on the meta device, and measured runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plans import MICRO, NANO, small_run, user_config

from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.plan.arithmetic import (
    BF16_CPUS,
    count_checkpoints,
    count_non_embedding,
    count_parameters,
    estimate_disk,
    estimate_memory,
    flops_per_token,
    muon_flops,
)
from smollm2.plan.machine import find_machine


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ({}, 137_860_608),
        ({"norm": "rmsnorm"}, 137_841_408),
        ({"norm": "rmsnorm", "tie_word_embeddings": False}, 162_417_408),
        ({"tie_word_embeddings": False}, 162_436_608),
        ({"norm": "rmsnorm", "vocab_size": 49152}, 151_014_144),
    ],
)
def test_parameters_of_the_users_shape_are_exact(model: dict[str, object], count: int) -> None:
    assert count_parameters(user_config(**model).model) == count


@pytest.mark.parametrize(
    ("preset", "parameters", "non_embedding", "gflops"),
    [
        ("smollm2-135m", 134_515_008, 106_203_456, 1.019),
        ("smollm2-360m", 361_821_120, 314_635_200, 2.548),
        ("smollm2-1.7b", 1_711_376_384, 1_610_713_088, 10.87),
    ],
)
def test_parameters_and_flops_of_smollm2_are_the_published_ones(
    preset: str, parameters: int, non_embedding: int, gflops: float
) -> None:
    model = load_config(preset=preset).model
    assert (count_parameters(model), count_non_embedding(model)) == (parameters, non_embedding)
    assert flops_per_token(model, 2048) / 1e9 == pytest.approx(gflops, rel=5e-4)


def test_flops_of_the_users_shape_are_those_of_performance_md() -> None:
    assert flops_per_token(user_config().model, 2048) / 1e9 == pytest.approx(0.940, rel=1e-3)


def test_flops_of_muon_are_those_of_its_products() -> None:
    """Counted by hand for matrices of (128, 128), (64, 128) and (128, 384): two, two and three in each of four layers."""
    model = small_run(NANO, 16, 1).model
    square, narrow, wide = 6 * 128**3, 4 * 64**2 * 128, 4 * 128**2 * 384
    on_whole = 2 * square + 2 * (narrow + 2 * 64**3) + 3 * (wide + 2 * 128**3)
    assert muon_flops(model, "cpu-bf16") == 4 * 4 * on_whole
    on_gram = 4 * 2 * square + 2 * (narrow + 13 * 2 * 64**3) + 3 * (wide + 13 * 2 * 128**3)
    assert muon_flops(model, "cpu-avx2") == 4 * on_gram


@pytest.mark.parametrize(
    ("device", "measured"),
    [("cpu-float32", 978e6), ("cpu-avx2", 978e6), ("cpu-avx512", 978e6), ("cpu-bf16", 847e6), ("cpu-amx", 847e6)],
)
def test_memory_is_near_what_a_run_used(device: str, measured: float) -> None:
    """micro in one micro-batch of 8, two cores, 2026-11-24."""
    assert estimate_memory(small_run(MICRO, 8, 1, "muon"), device).total == pytest.approx(measured, rel=0.1)


RUN_AND_MEASURE = """
import json, re, sys
from pathlib import Path
from smollm2 import load_config, train
from smollm2.plan.arithmetic import estimate_memory
preset, precision, steps = sys.argv[1:]
fixed = {"training.sample_tokens": 0, "data.validation_fraction": 0.002, "training.save_dir": f"{preset}-{precision}"}
config = load_config(preset=preset, **{"training.precision": precision, "training.train_steps": int(steps), **fixed})
train(config)
planned = estimate_memory(config, f"cpu-{precision}").total
# Not ru_maxrss, which begins at the size of the process that started this one.
measured = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([planned, measured]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_is_within_15_percent_of_what_the_presets_then_take(tmp_path: Path) -> None:
    """The highest resident size of whole runs, tokenizer and save included."""
    ratios = {}
    for preset, steps in (("nano", 4), ("micro", 2)):
        for precision in ("float32", "bf16") if find_machine(os.environ).device in BF16_CPUS else ("float32",):
            command = [sys.executable, "-c", RUN_AND_MEASURE, preset, precision, str(steps)]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            planned, measured = json.loads(done.stdout.splitlines()[-1])
            ratios[preset, precision] = planned / measured
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def test_gaps_in_the_heap_are_counted_if_tensors_are_small() -> None:
    large = user_config()
    assert estimate_memory(large, "cpu-bf16").gaps == 0
    once, twice = (estimate_memory(small_run(MICRO, 8, count), "cpu-float32") for count in (1, 2))
    assert 0 < once.gaps < twice.gaps < 0.3 * twice.total
    assert estimate_memory(small_run(MICRO, 8, 2), "NVIDIA H100").gaps == 0


@pytest.mark.parametrize(
    ("training", "part", "factor"),
    [
        ({"gradient_checkpointing": False}, "activations", 3),
        ({"attention": "eager", "gradient_checkpointing": False}, "activations", 3),
        ({"batch_size": 24}, "activations", 1.9),
        ({"precision": "float32"}, "activations", 1.9),
    ],
)
def test_memory_grows_with_what_is_kept(training: dict[str, object], part: str, factor: float) -> None:
    small = user_config()
    large = Config.model_validate({**small.model_dump(), "training": {**small.training.model_dump(), **training}})
    before, after = (getattr(estimate_memory(config, "cpu-bf16"), part) for config in (small, large))
    assert after > factor * before


def test_muon_keeps_one_moment_of_the_blocks_matrices() -> None:
    adamw, muon = (estimate_memory(small_run(NANO, 16, 1, name), "cpu-bf16") for name in ("adamw", "muon"))
    assert adamw.optimizer - muon.optimizer == 4 * 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)


def test_a_checkpoint_with_adamw_takes_twelve_bytes_a_parameter() -> None:
    disk = estimate_disk(user_config())
    assert disk.checkpoint_bytes == 12 * 137_860_608
    assert disk.total == 10 * disk.checkpoint_bytes


@pytest.mark.parametrize(
    ("training", "count"),
    [
        ({"train_steps": 5000, "save_interval": 500}, 10),
        ({"train_steps": 1001, "save_interval": 500}, 3),
        ({"train_steps": 100, "save_interval": 500}, 1),
        ({"train_steps": 5000, "save_interval": 0}, 1),
        ({"train_steps": 5000, "save_interval": 500, "keep_last": 3}, 4),
        ({"train_steps": 5000, "save_interval": 500, "keep_last": 3, "keep_every": 1000}, 9),
    ],
)
def test_checkpoints_are_counted_as_retention_keeps_them(training: dict[str, object], count: int) -> None:
    assert count_checkpoints(Config.model_validate({"training": training})) == count
