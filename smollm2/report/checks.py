"""The section about the checks of a run, from doctor.json of its folder.

{"form": "short", "step": 0, "checks": [{
    "name", "group", "verdict": "pass" | "warn" | "fail" | "skip", "seconds",
    "evidence": {"logits differ by": 5e-6}, "cause", "advice"
}]}
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2.analysis.checks import Finding, Result, Verdict, describe_evidence
from smollm2.errors import lay_out
from smollm2.report.json_files import Row, read_object, to_number, to_text

MOST_CHECKS = 200
VERDICTS: tuple[Verdict, ...] = ("fail", "warn", "pass", "skip")


@dataclass(frozen=True)
class Checks:
    """The checks of a run: the form, the step before which they were made, and their results."""

    form: str
    step: int
    results: Sequence[Result]


def read_checks(path: Path, problems: list[str]) -> Checks | None:
    """Return what doctor.json contains; None if it is missing or damaged, and damage is added to `problems`."""
    row = read_object(path, problems)
    if row is None:
        return None
    try:
        results = [parse_result(one) for one in row["checks"][:MOST_CHECKS]]
        return Checks(to_text(row["form"]), int(to_number(row["step"])), results)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        problems.append(lay_out(path.name, "is not a valid list of checks"))
        return None


def parse_result(row: Row) -> Result:
    """Return one result after checking the types of all values."""
    verdict = VERDICTS[VERDICTS.index(row["verdict"])]
    evidence = {
        str(name): value if isinstance(value, int | str) and not isinstance(value, bool) else to_number(value)
        for name, value in row["evidence"].items()
    }
    finding = Finding(verdict, evidence, to_text(row["cause"]), to_text(row["advice"]))
    return Result(to_text(row["name"]), to_text(row["group"]), finding, to_number(row["seconds"]))


def checks_section(checks: Checks | None, events: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Return the table of the checks, failures and warnings first; or why there are none."""
    if checks is None:
        is_skipped = any(event["kind"] == "preflight" for event in events)
        why = "The preflight was skipped." if is_skipped else "No checks were recorded."
        return {"note": f"{why} Make them with smollm2 doctor and the flags of this run."}
    counts = Counter(result.verdict for result in checks.results)
    words = {"fail": "failed", "warn": "warned", "pass": "passed", "skip": "skipped"}
    shown = ", ".join(f"{counts[verdict]} {words[verdict]}" for verdict in VERDICTS if counts[verdict])
    return {
        "count": f"{len(checks.results)}",
        "intro": f"{checks.form.capitalize()} form, before step {checks.step + 1:,}: {shown}.",
        "rows": [
            (result, describe_evidence(result.finding.evidence))
            for result in sorted(checks.results, key=lambda result: VERDICTS.index(result.verdict))
        ],
    }
