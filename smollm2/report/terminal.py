"""Curves in the terminal: eight braille dots per character if the encoding has them, otherwise one asterisk."""

import itertools
import math
import textwrap
from collections.abc import Sequence

from smollm2.report.reading import RunFolder
from smollm2.report.verdict import notes_of, verdict_of
from smollm2.tracking.base import escape_controls

ROWS = 12
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot in a braille character, by row and column."""

CHARTS = (("loss", "loss"), ("validation_loss", "validation loss"), ("grad_norm", "gradient norm"))


def draw_run(run: RunFolder, width: int, encoding: str) -> list[str]:
    """Return the verdict and the curves as lines of at most `width` characters."""
    texts = [run.name, *verdict_of(run), *notes_of(run), *run.problems]
    lines = [part for one in texts for part in textwrap.wrap(escape_controls(one, keep_newlines=False), max(20, width))]
    for metric, title in CHARTS:
        points = run.points(metric)
        if len(points) > 1:
            lines += ["", f"{title}, steps {points[0][0]:,} to {points[-1][0]:,}"]
            lines += draw_curve(points, max(20, width), has_braille(encoding))
    return lines


def has_braille(encoding: str) -> bool:
    """Return whether the encoding can represent the braille characters."""
    try:
        "\u28ff\u2502".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw_curve(points: Sequence[tuple[int, float]], width: int, braille: bool) -> list[str]:
    """Return `ROWS` lines: an axis labelled with its largest and smallest values, and the means of the dot columns."""
    values = [value for _, value in points]
    labels = [f"{number:.4g}" for number in (max(values), min(values))]
    margin = max(map(len, labels))
    across, down = (2, 4) if braille else (1, 1)
    columns = column_means(points, (width - margin - 3) * across)
    low, high = min(columns), max(columns)
    labels = [f"{high:.4g}", f"{low:.4g}"]
    grid = [[0] * len(columns) for _ in range(ROWS * down)]
    depths = [round((high - value) / ((high - low) or 1.0) * (ROWS * down - 1)) for value in columns]
    for column, (before, depth) in enumerate(itertools.pairwise([depths[0], *depths])):
        # Start beside the previous dot, so that a steep curve stays one line.
        for row in range(min(depth, before + 1), max(depth, before - 1) + 1):
            grid[row][column] = 1
    bar = "\u2502" if braille else "|"
    rows = (encode_row(grid[row * down : (row + 1) * down], across, braille) for row in range(ROWS))
    names = {0: labels[0], ROWS - 1: labels[1]}
    return [f"{names.get(number, ''):>{margin}} {bar}{row}".rstrip() for number, row in enumerate(rows)]


def encode_row(dots: Sequence[Sequence[int]], across: int, braille: bool) -> str:
    """Return the line of characters that shows these rows of dots."""
    if not braille:
        return "".join("*" if dot else " " for dot in dots[0])
    cells = range(0, len(dots[0]), across)
    codes = (
        sum(DOTS[row][column] for row in range(4) for column in range(2) if dots[row][start + column])
        for start in cells
    )
    return "".join(chr(0x2800 + code) if code else " " for code in codes)


def column_means(points: Sequence[tuple[int, float]], columns: int) -> list[float]:
    """Return the mean of the values in each column of dots; columns without a value are interpolated."""
    first, last = points[0][0], points[-1][0]
    buckets: list[list[float]] = [[] for _ in range(columns)]
    for step, value in points:
        buckets[round((step - first) / max(1, last - first) * (columns - 1))].append(value)
    means = [sum(bucket) / len(bucket) if bucket else math.nan for bucket in buckets]
    known = [column for column, mean in enumerate(means) if not math.isnan(mean)]
    for left, right in itertools.pairwise(known):
        for column in range(left + 1, right):
            means[column] = means[left] + (means[right] - means[left]) * (column - left) / (right - left)
    return means
