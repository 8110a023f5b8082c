"""Human-readable numbers: the only module that formats sizes in bytes, durations and counts."""

import math

BYTE_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
COUNT_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
LONG_UNITS = (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60))
CLOCK_UNITS = (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))


def format_bytes(size: float) -> str:
    """Return a size such as `1.6 GB`, with three significant digits and decimal units."""
    for unit, factor in BYTE_UNITS:
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def format_count(number: float) -> str:
    """Return a count such as `2.05 M`, with three significant digits."""
    for unit, factor in COUNT_UNITS:
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f}"


def format_estimate(seconds: float) -> str:
    """Return an estimated duration such as `2.5 hours` or `620 years`: two digits, or a whole number from 10 up."""
    for unit, factor in LONG_UNITS:
        if seconds >= 2 * factor:
            return f"{seconds / factor:,.0f} {unit}" if seconds >= 10 * factor else f"{seconds / factor:.2g} {unit}"
    return f"{seconds:.0f} seconds"


def format_duration(seconds: float) -> str:
    """Return a measured duration in its two largest units, such as `2 min 41 s`."""
    whole = round(seconds)
    for unit, size, smaller, part in CLOCK_UNITS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def format_step_time(seconds: float) -> str:
    """Return the duration of a step, such as `0.34 s per step`."""
    if seconds < 0.1:
        return f"{seconds:.2g} s per step"
    return f"{seconds:.2f} s per step" if seconds < 10 else f"{seconds:,.0f} s per step"


def format_number(number: float, form: str = "{:.4f}") -> str:
    """Return the number formatted with `form`, or a dash for NaN."""
    return "–" if math.isnan(number) else form.format(number)
