"""The mixture of a run: several inputs with weights, which may change at given steps.

Weights are whole ten-thousandths, so that every share is exact in the long run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from smollm2.config.values import FilePath, check_text

UNITS = 10_000
"""A weight of 1 in whole numbers."""

MOST_SOURCES = 64

STEP = re.compile(r"\d{1,10}")
TOKENS = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?) tokens")


def list_weights(value: object) -> object:
    """Return a single weight as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def check_start(text: str) -> str:
    """Return the start of a stage. Raise ValueError unless it is a step or a number of tokens."""
    if not STEP.fullmatch(text) and not TOKENS.fullmatch(text):
        raise ValueError(text)
    return check_text(text)


Weight = Annotated[float, Field(ge=0, le=1)]
Weights = Annotated[tuple[Weight, ...], BeforeValidator(list_weights), Field(min_length=1, max_length=MOST_SOURCES)]
Mixture = dict[FilePath, Weights]
StageStart = Annotated[str, BeforeValidator(str), AfterValidator(check_start)]


def count_units(weight: float) -> int:
    """Return a weight in ten-thousandths. Raise ValueError if it has more than four decimals."""
    units = Fraction(repr(weight)) * UNITS
    if units.denominator != 1:
        raise ValueError(weight)
    return int(units)


def list_stages(mixture: Mapping[str, Sequence[float]], stages: int) -> list[list[int]]:
    """Return the weights of each stage in ten-thousandths, (stages, sources). A single weight holds in every stage."""
    return [[count_units(w[stage] if len(w) > 1 else w[0]) for w in mixture.values()] for stage in range(stages)]


def first_step(start: str, tokens_per_step: int) -> int:
    """Return the step, counted from 0, at which a stage begins: the first one that begins after the tokens."""
    if STEP.fullmatch(start):
        return int(start)
    found = TOKENS.fullmatch(start)
    assert found
    return -int(-Fraction(found[1]) // tokens_per_step)


def find_problems(mixture: Mapping[str, Sequence[float]], stages: int) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the weights, and what to do."""
    for name, weights in mixture.items():
        if len(weights) not in (1, stages):
            what = f"{name!r} has {len(weights)} weights, but there are {stages} stages"
            yield what, "give one weight, or one for each stage"
            return
        for weight in weights:
            try:
                count_units(weight)
            except ValueError:
                yield f"the weight {weight!r} of {name!r} has more than four decimals", "round the weights"
                return
    for number, units in enumerate(list_stages(mixture, stages), 1):
        if sum(units) != UNITS:
            where = f" in stage {number}" if stages > 1 else ""
            yield f"the weights add up to {sum(units) / UNITS:g}{where}, not to 1", "change them so that they do"
