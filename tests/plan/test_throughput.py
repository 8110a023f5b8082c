"""Seconds: the table against measured runs, the records of runs, and the correction of a wrong estimate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import MICRO, NANO, in_folder, small_run, user_config
from runs import tiny_config, write_tiny

from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.plan.machine import Machine
from smollm2.plan.throughput import (
    CPU_SPEEDS,
    estimate_duration,
    find_throughput,
    is_compiled,
    record_throughput,
    table_throughput,
)
from smollm2.runtime.device import start_runtime
from smollm2.runtime.throughput import machine_of, measure_products
from smollm2.training.loop import train

BF16 = Machine("cpu-bf16", 2)
AVX2 = Machine("cpu-avx2", 2)


def step_of(config: Config, machine: Machine) -> float:
    return estimate_duration(config, machine).step


SHAPE_12M = {**MICRO, "num_key_value_heads": 6}


@pytest.mark.parametrize(
    ("config", "device", "measured"),
    [
        (small_run(NANO, 16, 1), "cpu-bf16", 0.127),
        (small_run(MICRO, 8, 2), "cpu-bf16", 1.6),
        (small_run(NANO, 16, 1, precision="float32"), "cpu-bf16", 0.195),
        (small_run(MICRO, 8, 2, precision="float32"), "cpu-bf16", 2.4),
        (small_run(NANO, 16, 1, "adamw"), "cpu-avx2", 0.22),
        (small_run(NANO, 16, 1, "muon"), "cpu-avx2", 0.22 + 0.031 / 2),
        (small_run(MICRO, 8, 2, "adamw"), "cpu-avx2", 2.5),
        (small_run(MICRO, 8, 2, "muon"), "cpu-avx2", 2.5 + 0.88 / 2),
        (small_run(SHAPE_12M, 8, 1, "adamw"), "cpu-avx2", 2048 / 1611),
        (small_run(NANO, 16, 1, "muon"), "cpu-avx2", 0.296),  # these three a day later, on a slower one of its kind
        (small_run(MICRO, 8, 2, "muon"), "cpu-avx2", 3.67),
        (small_run(SHAPE_12M, 8, 1, "adamw"), "cpu-avx2", 2048 / 1186),
    ],
)
def test_seconds_a_step_are_within_30_percent_of_what_was_measured(
    config: Config, device: str, measured: float
) -> None:
    """Two idle cores of an AMD EPYC, with avx512_bf16 on 2026-11-24, with AVX2 alone on 2026-11-25."""
    assert step_of(config, Machine(device, 2)) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(("model", "measured"), [(NANO, 0.031), (MICRO, 0.88)])
def test_the_time_of_muon_is_near_what_was_measured(model: dict[str, object], measured: float) -> None:
    """On one core with AVX2, 2026-11-25."""
    adamw, muon = (step_of(small_run(model, 8, 1, name), Machine("cpu-avx2", 1)) for name in ("adamw", "muon"))
    assert muon - adamw == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("device", [*CPU_SPEEDS, "mps", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "a GPU of next year"])
def test_every_kind_of_device_has_an_estimate(device: str) -> None:
    slowest = estimate_duration(user_config(), Machine("cpu-float32", 2)).total
    assert 0 < estimate_duration(user_config(), Machine(device, 8)).total < slowest


@pytest.mark.parametrize(
    "machine",
    [Machine("cpu-float32", 2), AVX2, Machine("cpu-bf16", 64), Machine("mps", 8), Machine("NVIDIA RTX 3060", 8)],
)
def test_the_shipped_config_takes_over_an_hour_on_a_small_machine(machine: Machine) -> None:
    assert estimate_duration(user_config(), machine).total > 3600


def test_nano_is_under_five_minutes_and_micro_under_ninety_on_two_cores() -> None:
    assert estimate_duration(load_config(preset="nano"), AVX2).total < 300
    assert estimate_duration(load_config(preset="micro"), AVX2).total < 90 * 60


def test_two_gpus_take_half_of_the_time_of_one() -> None:
    one = Machine("NVIDIA H100", 8)
    config = load_config(preset="smollm2-135m")
    assert step_of(config, replace(one, devices=2)) == pytest.approx(step_of(config, one) / 2, rel=0.01)


H100 = Machine("NVIDIA H100", 8)


@pytest.mark.parametrize(
    ("setting", "machine", "steps", "precision", "expected"),
    [
        ("auto", BF16, 100_000, "auto", True),
        ("auto", BF16, 100, "auto", False),  # over before compilation has paid
        ("auto", BF16, 100_000, "float32", False),  # no gain that was measured
        ("auto", AVX2, 100_000, "auto", False),
        ("auto", H100, 100_000, "auto", True),
        ("auto", H100, 100, "auto", False),
        ("auto", Machine("mps", 8), 100_000, "auto", False),
        (True, AVX2, 1, "auto", True),
        (False, H100, 100_000, "auto", False),
    ],
)
def test_a_run_is_compiled_if_it_is_long_enough_to_gain_from_it(
    setting: object, machine: Machine, steps: int, precision: str, expected: bool
) -> None:
    config = small_run(MICRO, 16, 1, compile=setting, train_steps=steps, precision=precision)
    assert is_compiled(config, machine) == expected


def test_a_measurement_of_the_products_scales_the_table() -> None:
    config = small_run(NANO, 16, 1)
    slow = find_throughput(config, AVX2, products=64e9)  # half of the table's
    assert slow.is_scaled
    before = estimate_duration(config, AVX2)
    assert estimate_duration(config, AVX2, slow).total == pytest.approx(2 * before.total, rel=0.1)
    gpu = Machine("NVIDIA H100", 8)
    assert find_throughput(config, gpu, products=64e9) == table_throughput(config, gpu)


def test_the_measurement_takes_a_fifth_of_a_second_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert 1e8 < measure_products(seconds=0.05) < 1e14
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_and_samples_are_part_of_the_time() -> None:
    plain: dict[str, Any] = {"eval_windows": 1, "sample_tokens": 0}
    often: dict[str, Any] = {"eval_interval": 1}
    fast, slow = (small_run(NANO, 16, 1, train_steps=100, **keys) for keys in (plain, often))
    assert estimate_duration(slow, AVX2).total > 1.5 * estimate_duration(fast, AVX2).total


def test_a_run_records_its_throughput_for_the_plan_of_another(tmp_path: Path) -> None:
    nano, user = in_folder(small_run(NANO, 16, 1, "adamw"), tmp_path), in_folder(user_config(), tmp_path)
    record_throughput(nano, BF16, 2 * step_of(nano, BF16))
    found = find_throughput(user, BF16)
    assert found.measured
    assert estimate_duration(user, BF16, found).total == pytest.approx(
        2 * estimate_duration(user, BF16).total, rel=0.05
    )
    assert find_throughput(user, BF16, products=1e9) == found
    assert not find_throughput(user, replace(BF16, cores=4)).measured
    assert not find_throughput(user, AVX2).measured


def test_a_run_that_is_too_small_leaves_the_table_of_the_products(tmp_path: Path) -> None:
    tiny = small_run({**NANO, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 257}, 1, 2, "adamw")
    tiny, user = in_folder(tiny, tmp_path), in_folder(user_config(), tmp_path)
    record_throughput(tiny, BF16, 10.0)
    assert find_throughput(user, BF16).flops == table_throughput(user, BF16).flops


def test_the_fastest_of_recent_records_counts_and_a_slower_machine_is_believed_in_the_end(tmp_path: Path) -> None:
    config = in_folder(user_config(), tmp_path)
    usual = step_of(config, BF16)
    found = []
    for factor in (3, 1.5, 2, 2, 2, 2, 2):
        record_throughput(config, BF16, factor * usual)
        found.append(estimate_duration(config, BF16, find_throughput(config, BF16)).step / usual)
    assert found == pytest.approx([3, 1.5, 1.5, 1.5, 1.5, 1.5, 2])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"KEY": [{"flops": 0}, 3]}', '{"KEY": 1}'])
def test_a_damaged_record_is_ignored(text: str, tmp_path: Path) -> None:
    (tmp_path / "throughput.json").write_text(text.replace("KEY", "cpu-bf16, bf16, adamw, 2 cores"))
    assert not find_throughput(in_folder(user_config(), tmp_path), BF16).measured


def test_training_records_its_throughput_in_the_cache_folder(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = tiny_config(tmp_path)
    train(config)
    assert find_throughput(config.with_vocab_size(257), machine_of(start_runtime(config.training))).measured
