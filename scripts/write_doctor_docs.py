"""Write docs/doctor.md from the checks and from tests/sabotages.py. A test checks that it is current."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from sabotages import SABOTAGES  # noqa: E402

from smollm2.analysis.checks import GROUPS, Check  # noqa: E402
from smollm2.analysis.gradient_checks import DIFFERENCES  # noqa: E402
from smollm2.analysis.model_checks import ANY_MODEL  # noqa: E402
from smollm2.analysis.own_checks import OWN_MODEL  # noqa: E402
from smollm2.training.checklist import DATA, MACHINE, STEP  # noqa: E402

PAGE = ROOT / "docs" / "doctor.md"

INTRODUCTION = """# What `smollm2 doctor` checks

Written by `scripts/write_doctor_docs.py` from the checks themselves; change those instead.

    smollm2 doctor --preset nano              # all checks, with the flags of train; trains nothing
    smollm2 doctor --preset nano --short      # only those that train makes before its first step
    smollm2 doctor --preset nano --json       # for a program; --strict: exit code 5 for warnings too

Training code that is wrong trains on without a word. So each run is checked before its first step: its own model, tokens,
optimizers and functions, on this machine. Each check gives a verdict (pass, warn, fail, or skip with the reason), the
numbers that it saw, and on a failure the likeliest cause and what to do. A failure ends the run with exit code 5 before
anything was trained; `--skip_preflight` (`training.preflight: false`) trains all the same, which the run's events record. The
results are in `doctor.json` of the run folder and in the report.

Nothing of the run is changed: gradients and the random state are put back, so a run has the same bits with and without the
preflight. What steps, saves or moves weights is done on a *twin*: two layers of the model's widths with at most 512 ids and 64
positions, trained by the run's own functions, in a temporary folder. Checks of the model read the run's own weights, with
inputs of at most 64 tokens. A resumed run makes only the checks that are marked *resume*. If the model is shared out among
ranks (FSDP), the checks of its own weights are skipped, and those of the twin are made.

`smollm2 verify` makes the checks of the first group that need no config, on a model of your own: [verify.md](verify.md).
"""

FAULTS = """## Faults that were planted

Each of these faults is planted in this package by a test, and the named check must see it
(`tests/training/test_preflight.py`); sound runs of some 80 kinds must raise no alarm (`tests/training/test_sound_runs.py`).

| fault | check | verdict |
|---|---|---|
"""


def render() -> str:
    """Return the text of docs/doctor.md."""
    checks: list[Check[Any]] = [*ANY_MODEL, *OWN_MODEL, DIFFERENCES, *STEP, *DATA, *MACHINE]
    parts = [INTRODUCTION]
    for group in GROUPS:
        rows = [describe(check) for check in checks if check.group == group]
        head = "| check | what a pass proves | how | what it cannot see |\n|---|---|---|---|\n"
        parts.append(f"## {group.capitalize()}\n\n{head}" + "\n".join(rows) + "\n")
    faults = "\n".join(f"| {one.fault} | `{one.check}` | {one.verdict} |" for one in SABOTAGES)
    return "\n".join(parts) + "\n" + FAULTS + faults + "\n"


def describe(check: Check[Any]) -> str:
    """Return a row of the table."""
    marks = [*(["deep"] if check.deep else []), *(["resume"] if check.on_resume else [])]
    shown = f" ({', '.join(marks)})" if marks else ""
    return f"| `{check.name}`{shown} | {check.proves} | {check.how} | {check.misses} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
