"""Types of config values that pydantic does not provide: durations, text and paths."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

SLURM_DURATION = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration(value: object) -> object:
    """Return `90m`, `1h30m` or Slurm's `1-12:00:00` in seconds; return other values unchanged for pydantic to parse."""
    if not isinstance(value, str):
        return value
    if match := SLURM_DURATION.fullmatch(value):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    parts = DURATION_PART.findall(value)
    if parts and "".join(number + unit for number, unit in parts) == value:
        return sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)
    return value


def check_text(text: str) -> str:
    """Return the text. Raise ValueError if it is not valid Unicode: a lone surrogate cannot be stored or sent."""
    text.encode("utf-8")
    return text


def expand_path(text: str) -> str:
    """Return the path with `~` expanded. Raise ValueError if no file can have that name."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises RuntimeError if there is no home folder
    if not text or "\0" in text or expanded.startswith("~"):
        raise ValueError(text)
    return expanded


def name_folder(text: str) -> str:
    """Return a path that ends in a folder name, so that other folders can be placed beside it; `.` becomes absolute.

    Raise ValueError for the root of the file system.
    """
    path = Path(text)
    if path.name in ("", ".."):
        path = Path(os.path.realpath(text))
    if not path.name:
        raise ValueError(text)
    return str(path)


ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The numbers of Llama 3's rope scaling."""


def find_scaling_problem(scaling: Mapping[str, float]) -> str:
    """Return what is wrong with a rope scaling that is not empty, or an empty string."""
    if not scaling:
        return ""
    if wrong := set(scaling) ^ set(ROPE_SCALING):
        return f"must have exactly {', '.join(ROPE_SCALING)} (wrong: {min(wrong)})"
    fits = min(scaling.values()) > 0 and scaling["high_freq_factor"] > scaling["low_freq_factor"]
    return "" if fits else "needs numbers above 0, and high_freq_factor above low_freq_factor"


@dataclass(frozen=True)
class Given:
    """A config value: its parsed value, its original text, and where it was set."""

    value: Any
    text: str
    origin: str


Level = dict[str, Given]


def locate(key: str, origin: str) -> str:
    """Return a problem's location. Add the key unless the origin is a flag or an argument, which already names it."""
    return origin if origin.startswith(("--", "argument ")) else f"{origin}: {key}"


Switch = Literal["auto"] | bool
Beta = Annotated[float, Field(ge=0, lt=1)]
Duration = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=float | str)]
Text = Annotated[str, AfterValidator(check_text)]
FilePath = Annotated[Text, AfterValidator(expand_path)]
FolderPath = Annotated[FilePath, AfterValidator(name_folder)]
