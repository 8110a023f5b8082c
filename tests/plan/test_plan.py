"""Arithmetic against figures that were counted elsewhere: transformers on the meta device, and measured runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import tiny_config, write_tiny

from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.plan.arithmetic import (
    count_checkpoints,
    count_non_embedding,
    count_parameters,
    describe_plan,
    estimate_here,
    estimated_seconds,
    find_device,
    find_pace,
    flops_per_token,
    keep_pace,
    make_plan,
)
from smollm2.training.loop import train

ROOT = Path(__file__).parents[2]


NANO = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
NANO |= {"num_key_value_heads": 2, "intermediate_size": 384, "max_position_embeddings": 128, "norm": "rmsnorm"}
MICRO = {"vocab_size": 4096, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
MICRO |= {"num_key_value_heads": 2, "intermediate_size": 1024, "max_position_embeddings": 256, "norm": "rmsnorm"}


def small_run(model: dict[str, object], batch_size: int, accumulation: int, optimizer: str = "muon") -> Config:
    training = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "optimizer": optimizer}
    return Config.model_validate({"model": model, "training": {**training, "train_steps": 10}})


def user_config(**model: object) -> Config:
    return load_config(ROOT / "config.yaml", model=model)


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


@pytest.mark.parametrize(("device", "measured"), [("cpu-float32", 978e6), ("cpu-bf16", 847e6)])
def test_memory_is_near_what_a_run_took(device: str, measured: float) -> None:
    """micro in one micro-batch of 8, two cores, 2026-11-24."""
    assert make_plan(small_run(MICRO, 8, 1, "muon"), device, 2).memory.total == pytest.approx(measured, rel=0.1)


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
        for precision in ("float32", "bf16"):
            command = [sys.executable, "-c", RUN_AND_MEASURE, preset, precision, str(steps)]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            planned, measured = json.loads(done.stdout.splitlines()[-1])
            ratios[preset, precision] = planned / measured
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def test_what_a_micro_batch_leaves_in_the_heap_is_counted_where_pieces_are_small() -> None:
    large = user_config()
    assert make_plan(large, "cpu-bf16", 2).memory.gaps == 0
    once, twice = (make_plan(small_run(MICRO, 8, count), "cpu-float32", 2).memory for count in (1, 2))
    assert 0 < once.gaps < twice.gaps < 0.3 * twice.total
    assert make_plan(small_run(MICRO, 8, 2), "NVIDIA H100", 2).memory.gaps == 0


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
    before, after = (getattr(make_plan(config, "cpu-bf16", 2).memory, part) for config in (small, large))
    assert after > factor * before


def test_muon_keeps_one_moment_of_the_blocks_matrices() -> None:
    adamw, muon = (make_plan(small_run(NANO, 16, 1, name), "cpu-bf16", 2).memory for name in ("adamw", "muon"))
    assert adamw.optimizer - muon.optimizer == 4 * 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)


def test_a_checkpoint_with_adamw_takes_twelve_bytes_a_parameter() -> None:
    plan = make_plan(user_config(), "cpu-bf16", 2)
    assert plan.checkpoint_bytes == 12 * 137_860_608
    assert plan.disk_bytes == 10 * plan.checkpoint_bytes


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
def test_checkpoints_are_counted_as_retention_leaves_them(training: dict[str, object], count: int) -> None:
    assert count_checkpoints(Config.model_validate({"training": training})) == count


@pytest.mark.parametrize(
    ("config", "device", "measured"),
    [
        (small_run(NANO, 16, 1), "cpu-bf16", 0.127),
        (small_run(NANO, 16, 1), "cpu-float32", 0.195),
        (small_run(MICRO, 8, 2), "cpu-bf16", 1.6),
        (small_run(MICRO, 8, 2), "cpu-float32", 2.4),
    ],
)
def test_seconds_a_step_are_within_30_percent_of_what_was_measured(
    config: Config, device: str, measured: float
) -> None:
    """Two cores of an AMD EPYC with avx512_bf16, 2026-11-24."""
    assert make_plan(config, device, 2).seconds_per_step == pytest.approx(measured, rel=0.3)


def test_a_measured_rate_replaces_the_table() -> None:
    plan = make_plan(small_run(NANO, 16, 1), "cpu-bf16", 2, tokens_per_second=4096)
    assert (plan.seconds_per_step, plan.seconds) == (0.5, 5.0)


@pytest.mark.parametrize(
    ("device", "cores"),
    [("cpu-float32", 2), ("cpu-bf16", 64), ("mps", 8), ("NVIDIA GeForce RTX 3060", 8)],
)
def test_the_shipped_config_takes_over_an_hour_on_a_small_machine(device: str, cores: int) -> None:
    assert estimated_seconds(user_config(), device, cores) > 3600


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "mps", "a GPU of next year"])
def test_every_kind_of_device_has_an_estimate(device: str) -> None:
    assert 0 < estimated_seconds(user_config(), device, 8) < estimated_seconds(user_config(), "cpu-float32", 2)


def test_nano_is_under_five_minutes_and_micro_under_an_hour_on_two_cores() -> None:
    assert estimated_seconds(load_config(preset="nano"), "cpu-float32", 2) < 240
    assert estimated_seconds(load_config(preset="micro"), "cpu-float32", 2) < 3300


def test_this_machine_can_be_asked_about_a_file() -> None:
    device, cores = find_device()
    assert cores >= 1
    assert estimate_here(ROOT / "config.yaml") == estimated_seconds(user_config(), device, cores)


def in_folder(config: Config, folder: Path) -> Config:
    """The same config with input and cache in `folder`."""
    return Config.model_validate(
        {**config.model_dump(), "data": {"input": str(folder / "input.txt"), "cache_dir": str(folder), "stride": 2048}}
    )


def test_the_rows_say_what_the_plan_holds(tmp_path: Path) -> None:
    rows = dict(describe_plan(in_folder(user_config(), tmp_path), "cpu-bf16", 2))
    assert rows["parameters"].startswith("137,860,608: 24,576,000 in embeddings")
    assert rows["disk"] == "16.5 GB: 10 x 1.65 GB"
    assert rows["arithmetic"] == "0.94 GFLOP a token, 98,304 tokens a step"
    assert rows["tokens"].startswith("491,520,000 in the run, 3.57 for each parameter; epochs unknown")
    assert rows["time here"].endswith("an estimate: no run has left its rate yet")
    assert rows["checkpointing"].endswith("costs 33% of the time")


def test_a_model_that_does_not_fit_a_card_is_said_to() -> None:
    rows = dict(describe_plan(load_config(preset="smollm2-1.7b"), "cpu-bf16", 2))
    assert rows["  one T4"].startswith("does not fit")
    assert not rows["  one H200"].startswith("does not fit")


def test_epochs_come_from_the_size_of_the_text_until_a_run_has_counted_it(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("x" * 4_915_200)
    config = in_folder(user_config(), tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": "bytes"})})
    assert "105 epochs of 4,669,440 (an estimate from its size)" in dict(describe_plan(config, "cpu-bf16", 2))["tokens"]
    (tmp_path / "abc").mkdir()
    header = {"vocab_size": 257, "statistics": {"bytes": 4_915_200, "train_tokens": 4_000_000}}
    (tmp_path / "abc" / "header.json").write_text(json.dumps(header))
    rows = dict(describe_plan(config, "cpu-bf16", 2))
    assert "123 epochs of 4,000,000 (as an earlier run counted)" in rows["tokens"]
    assert rows["parameters"].startswith(f"{137_860_608 - (32000 - 257) * 768:,}")


def test_a_run_leaves_its_pace_for_the_plan_of_another(tmp_path: Path) -> None:
    nano, user = in_folder(small_run(NANO, 16, 1), tmp_path), in_folder(user_config(), tmp_path)
    before = make_plan(user, "cpu-bf16", 2)
    keep_pace(nano, "cpu-bf16", 2, 2 * make_plan(nano, "cpu-bf16", 2).seconds_per_step)
    pace = find_pace(user, "cpu-bf16", 2)
    assert pace.measured
    assert make_plan(user, "cpu-bf16", 2, pace=pace).seconds == pytest.approx(2 * before.seconds)
    assert not find_pace(user, "cpu-bf16", 4).measured
    assert not find_pace(user, "cpu-float32", 2).measured


def test_a_run_too_small_to_tell_leaves_the_rate_of_the_products(tmp_path: Path) -> None:
    tiny = small_run({**NANO, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 257}, 1, 2, "adamw")
    tiny, user = in_folder(tiny, tmp_path), in_folder(user_config(), tmp_path)
    keep_pace(tiny, "cpu-bf16", 2, 10.0)
    assert find_pace(user, "cpu-bf16", 2).flops == find_pace(user, "cpu-bf16", 4).flops / 2


def test_the_fastest_of_recent_paces_counts_and_a_slower_machine_is_believed_in_the_end(tmp_path: Path) -> None:
    config = in_folder(user_config(), tmp_path)
    usual = make_plan(config, "cpu-bf16", 2).seconds_per_step
    expected = []
    for factor in (3, 1.5, 2, 2, 2, 2, 2):
        keep_pace(config, "cpu-bf16", 2, factor * usual)
        pace = find_pace(config, "cpu-bf16", 2)
        expected.append(make_plan(config, "cpu-bf16", 2, pace=pace).seconds_per_step / usual)
    assert expected == pytest.approx([3, 1.5, 1.5, 1.5, 1.5, 1.5, 2])


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": 1}', '{"cpu-bf16, bf16, 2 cores": [{"flops": 0}, 3]}', '{"cpu-bf16, bf16, 2 cores": 1}'],
)
def test_a_damaged_pace_is_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text(text)
    assert not find_pace(in_folder(user_config(), tmp_path), "cpu-bf16", 2).measured


def test_training_leaves_its_pace_in_the_cache_folder(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = tiny_config(tmp_path)
    threads = torch.get_num_threads()
    device, cores = find_device()
    torch.set_num_threads(cores)
    try:
        train(config)
    finally:
        torch.set_num_threads(threads)
    assert find_pace(config, device, cores).measured
