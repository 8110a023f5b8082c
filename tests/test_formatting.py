"""Numbers as a person reads them."""

import pytest

from smollm2.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_estimate,
    format_number,
    format_step_time,
)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (45, "45 seconds"),
        (150, "2.5 minutes"),
        (3000, "50 minutes"),
        (9000, "2.5 hours"),
        (1e6, "12 days"),
        (2e10, "634 years"),
    ],
)
def test_an_estimate_is_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert format_estimate(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(9.4, "9 s"), (161, "2 min 41 s"), (7260, "2 h 1 min"), (180_000, "2 d 2 h")]
)
def test_a_duration_is_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (25.2e6, "25.2 MB"), (1.65e9, "1.65 GB"), (2e12, "2 TB")],
)
def test_bytes_are_in_the_unit_that_fits(number: float, words: str) -> None:
    assert format_bytes(number) == words


@pytest.mark.parametrize(("number", "words"), [(512, "512"), (2.048e6, "2.05 M"), (135e9, "135 B")])
def test_counts_are_in_the_unit_that_fits(number: float, words: str) -> None:
    assert format_count(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.012, "0.012 s per step"), (0.34, "0.34 s per step"), (73, "73 s per step")]
)
def test_a_step_time_keeps_two_significant_digits(seconds: float, words: str) -> None:
    assert format_step_time(seconds) == words


def test_nan_is_a_dash() -> None:
    assert format_number(float("nan")) == "–"
