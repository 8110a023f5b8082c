"""The time on the start page, and its correction after some steps."""

from pathlib import Path

import pytest
from runs import tiny_config, write_tiny

from smollm2.config.schema import Config
from smollm2.plan.throughput import record_throughput
from smollm2.runtime.device import start_runtime
from smollm2.runtime.throughput import machine_of
from smollm2.training.loop import train


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny(tmp_path)
    return tiny_config(tmp_path, training__train_steps=25, training__sample_tokens=0, training__eval_interval=0)


def record(config: Config, seconds: float) -> None:
    """Pretend that an earlier run here took so many seconds a step."""
    Path(config.data.cache_dir).mkdir()
    record_throughput(config.with_vocab_size(257), machine_of(start_runtime(config.training)), seconds)


def test_a_time_that_is_far_from_the_truth_is_corrected_once_in_one_line(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    record(config, 100)
    train(config)
    lines = capsys.readouterr().out.splitlines()
    [announced] = [line for line in lines if line.startswith("  time ") and "about" in line]
    assert " minutes, from a run on this machine on 20" in announced
    [corrected] = [line for line in lines if "CORRECTED TIME" in line]
    assert "left, not 8" in corrected and "times faster than estimated" in corrected
    assert lines.index(corrected) > lines.index(announced)


def test_a_run_of_seconds_is_announced_from_the_table_and_not_corrected(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    shown = capsys.readouterr().out
    assert "seconds, estimated from a table" in shown and "CORRECTED" not in shown


def test_the_end_page_shows_how_to_generate_text(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  generate text")]
    assert "smollm2 generate " in line and line.endswith('/checkpoints --prompt "Once upon a time"')
