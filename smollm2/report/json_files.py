"""Read the JSON files of a run folder without trusting them: what is damaged is added to `problems`, and no error is raised.

The functions `to_...` check one value; they raise an error that the readers count as damage.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from smollm2.errors import lay_out

LINE_BYTES = 4 * 2**20
LARGEST_STEP = 2**53
LARGEST_NUMBER = 1e100
LARGEST_GRID = 201

Row = Mapping[str, Any]
Parsed = TypeVar("Parsed")


def read_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers. An incomplete last line is omitted, since it will be rewritten."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
                if line.endswith(b"\n") or len(line) == LINE_BYTES:
                    yield number, line
    except OSError as error:
        problems.append(lay_out(path.name, f"cannot be read ({error.strerror or error})"))


def read_rows(path: Path, problems: list[str], parse: Callable[[Row], Parsed]) -> list[Parsed]:
    """Return the parsed rows of a file. The number of damaged lines, and the first of them, are added to `problems`."""
    rows: list[Parsed] = []
    damaged: list[int] = []
    for number, line in read_lines(path, problems):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not is_step(row.get("step")):
                raise ValueError(row)
            rows.append(parse(row))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            damaged.append(number)
    if damaged:
        lines = "1 damaged line is" if len(damaged) == 1 else f"{len(damaged):,} damaged lines are"
        problems.append(lay_out(f"{path.name}:{damaged[0]}", f"{lines} omitted"))
    return rows


def read_object(path: Path, problems: list[str]) -> Row | None:
    """Return the JSON object in a small file; None if the file is missing or damaged."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LINE_BYTES))
        if isinstance(found, dict):
            return found
        problems.append(lay_out(path.name, "is not a JSON object"))
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(lay_out(path.name, f"cannot be read ({error.strerror or error})"))
    except (ValueError, RecursionError):
        problems.append(lay_out(path.name, "is not valid JSON"))
    return None


def is_step(value: object) -> bool:
    """Return whether the value is a valid number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_STEP


def to_number(value: object) -> float:
    """Return a number from a row; NaN if it is null, absent or too large. Raise ValueError if it is not a number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value) if abs(value) < LARGEST_NUMBER else math.nan


def to_numbers(value: Any) -> dict[str, float]:
    """Return the value as a mapping from names to numbers. Raise ValueError or AttributeError if it is not one."""
    return {str(name): to_number(number) for name, number in value.items()}


def to_list(value: Any) -> list[float]:
    """Return the value as a list of numbers of bounded length. Raise ValueError if it is not one."""
    if not isinstance(value, list) or len(value) > LARGEST_GRID:
        raise ValueError(value)
    return [to_number(number) for number in value]


def to_text(value: object) -> str:
    """Return the value if it is a string. Raise ValueError if it is not."""
    if not isinstance(value, str):
        raise ValueError(value)
    return value
