"""The time on the start page, and its correction after some steps."""

import re
from pathlib import Path

import pytest
from runs import tiny_config, write_tiny

from smollm2.config.schema import Config
from smollm2.plan.throughput import Duration, record_throughput
from smollm2.runtime.device import start_runtime
from smollm2.runtime.throughput import machine_of
from smollm2.training.loop import train
from smollm2.training.timing import Forecast


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
    whole = re.search(r"about ([0-9.]+) minutes, from a run on this machine on 20", announced)
    [corrected] = [line for line in lines if "CORRECTED TIME" in line]
    left = re.search(r"left, not ([0-9.]+) minutes: this machine is [0-9.]+ times faster than estimated", corrected)
    assert whole and left
    assert float(left[1]) == pytest.approx(float(whole[1]) / 5, abs=0.15), "the correction comes after 20 of 25 steps"
    assert lines.index(corrected) > lines.index(announced)


def test_a_run_of_seconds_is_announced_from_the_table_and_not_corrected(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    shown = capsys.readouterr().out
    assert "seconds, estimated from a table" in shown and "CORRECTED" not in shown


def test_a_validation_counts_no_more_windows_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, training__train_steps=2, training__eval_windows=10**9))
    [announced] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  time ")][:1]
    assert " seconds, " in announced


def test_the_end_page_shows_how_to_generate_text(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  generate text")]
    assert "smollm2 generate " in line and line.endswith('/checkpoints --prompt "Once upon a time"')


def corrections(step_seconds: list[float], announced: float = 1.0) -> list[tuple[int, str]]:
    """Return the step and the line of each correction of a run of 1,000 steps."""
    forecast = Forecast(Duration(step=announced, besides=0.0, steps=1000))
    lines = [(step, forecast.add(seconds, 1000 - step)) for step, seconds in enumerate(step_seconds, 1)]
    return [(step, line.removeprefix("CORRECTED TIME: about ")) for step, line in lines if line]


COMPILED = 30.0
"""Seconds of a first step, which is no evidence."""


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([COMPILED, *999 * [1.4]], []),
        ([COMPILED, *999 * [0.7]], []),
        (
            [COMPILED, *999 * [5.0]],
            [(20, "82 minutes left, not 16 minutes: this machine is 5.0 times slower than estimated")],
        ),
        (
            [COMPILED, *999 * [0.2]],
            [(20, "3.3 minutes left, not 16 minutes: this machine is 5.0 times faster than estimated")],
        ),
    ],
)
def test_an_announced_time_is_corrected_once_if_it_was_far_off(
    steps: list[float], expected: list[tuple[int, str]]
) -> None:
    assert corrections(steps) == expected


def test_a_few_seconds_of_another_program_are_not_taken_for_a_slow_machine() -> None:
    usual, disturbed = 50 * [0.25], 30 * [0.6]  # 18 s
    assert corrections([*disturbed, *usual, *usual, *disturbed, *usual], announced=0.25) == []


def test_a_correction_is_itself_corrected_after_the_other_program_has_ended() -> None:
    steps = [*40 * [0.75], *900 * [0.25]]
    assert [line.partition(" than")[0].rpartition("is ")[2] for _, line in corrections(steps, announced=0.25)] == [
        "3.0 times slower",
        "3.0 times faster",
    ]


def test_the_time_of_a_run_of_seconds_is_not_corrected() -> None:
    assert corrections(999 * [0.01], announced=0.001) == []
