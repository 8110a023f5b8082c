"""The page of `smollm2 plan`."""

import json
from pathlib import Path

from plans import NANO, in_folder, small_run, user_config

from smollm2.config.reading import load_config
from smollm2.plan.describe import describe_machine, describe_plan
from smollm2.plan.machine import Machine
from smollm2.plan.throughput import estimate_duration, record_throughput

BF16 = Machine("cpu-bf16", 2)


def test_the_rows_hold_the_plan(tmp_path: Path) -> None:
    rows = dict(describe_plan(in_folder(user_config(), tmp_path), BF16))
    assert rows["parameters"].startswith("137,860,608: 24,576,000 in embeddings (shared with the head), 113,284,608 in")
    assert rows["disk"] == "16.5 GB: 10 checkpoints of 1.65 GB"
    assert rows["compute"] == "0.94 GFLOP per token, 98,304 tokens per step"
    assert rows["tokens"].startswith("491,520,000 in the run, 3.57 per parameter; epochs unknown")
    assert rows["time here"].endswith("on 2 cores of a CPU with AVX-512 and bf16; estimated from a table")
    assert rows["checkpointing"].endswith("adds 33% to the time")


def test_a_time_from_an_earlier_run_has_its_day(tmp_path: Path) -> None:
    nano = in_folder(small_run(NANO, 16, 1), tmp_path)
    record_throughput(nano, BF16, estimate_duration(nano, BF16).step)
    assert "from a run on this machine on 20" in dict(describe_plan(nano, BF16))["time here"]


def test_several_gpus_have_a_row_of_their_own() -> None:
    rows = dict(describe_plan(load_config(preset="smollm2-135m"), Machine("NVIDIA H100", 8, gpus=4)))
    assert "on one NVIDIA H100" in rows["time here"] and "./run_training.sh" in rows["  all 4 GPUs"]


def test_a_machine_has_a_name_that_can_be_read() -> None:
    assert describe_machine(Machine("cpu-avx2", 1)) == "1 core of a CPU with AVX2"
    assert describe_machine(Machine("NVIDIA L4", 4, 2, devices=2)) == "2 x NVIDIA L4"


def test_a_model_that_does_not_fit_a_gpu_is_marked() -> None:
    rows = dict(describe_plan(load_config(preset="smollm2-1.7b"), BF16))
    assert rows["  one T4"].startswith("does not fit")
    assert not rows["  one H200"].startswith("does not fit")


def test_epochs_come_from_the_size_of_the_text_until_a_run_has_counted_it(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("x" * 4_915_200)
    config = in_folder(user_config(), tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": "bytes"})})
    assert "105 epochs of 4,669,440 (estimated from the file's size)" in dict(describe_plan(config, BF16))["tokens"]
    (tmp_path / "abc").mkdir()
    header = {"vocab_size": 257, "statistics": {"bytes": 4_915_200, "train_tokens": 4_000_000}}
    (tmp_path / "abc" / "index.json").write_text(json.dumps(header))
    rows = dict(describe_plan(config, BF16))
    assert "123 epochs of 4,000,000 (counted by an earlier run)" in rows["tokens"]
    assert rows["parameters"].startswith(f"{137_860_608 - (32000 - 257) * 768:,}")
