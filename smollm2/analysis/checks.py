"""Checks that a run is right: what a check is, how checks are run, and how their results are shown.

A check returns a finding: numbers as evidence, and on a failure the likeliest cause and what to do next. A check that
cannot be made on this run returns a finding with the verdict `skip` and the reason.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from smollm2.errors import Interrupted

Verdict = Literal["pass", "warn", "fail", "skip"]
Subject = TypeVar("Subject")
Evidence = Mapping[str, float | int | str]
"""Numbers by what they are, in words."""

SLOW_SECONDS = 1.0
"""A check that takes longer shows its time."""

GROUPS = ("model", "loss and step", "data", "machine and run")


@dataclass(frozen=True)
class Finding:
    """The outcome of a check. `cause` is the likeliest cause of a failure or a warning, or the reason of a skip."""

    verdict: Verdict
    evidence: Evidence = field(default_factory=dict)
    cause: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """A named check: what its pass proves, how, and what it cannot see; docs/doctor.md prints these.

    A `deep` check is left out of the short form. `on_resume` says whether a resumed run makes it too, `on_twin` whether a
    check of the model needs only the weights of its twin.
    """

    name: str
    group: str
    proves: str
    how: str
    misses: str
    run: Callable[[Subject], Finding]
    deep: bool = False
    on_resume: bool = False
    on_twin: bool = False


@dataclass(frozen=True)
class Result:
    """The finding of one check, and the seconds it took."""

    name: str
    group: str
    finding: Finding
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """The verdict of the finding."""
        return self.finding.verdict


def passed(evidence: Evidence) -> Finding:
    """Return a finding that passes."""
    return Finding("pass", evidence)


def skipped(reason: str) -> Finding:
    """Return a finding of a check that cannot be made here."""
    return Finding("skip", {}, reason)


def skip_check(check: Check[Any], reason: str) -> Check[Any]:
    """Return a check of the same name that is skipped for a reason."""
    return replace(check, run=lambda subject: skipped(reason))


def judge(is_right: bool, cause: str, advice: str, *, evidence: Evidence, warns: bool = False) -> Finding:
    """Return a finding that passes if `is_right`, and otherwise fails (or warns) with the cause and the advice."""
    if is_right:
        return Finding("pass", evidence)
    return Finding("warn" if warns else "fail", evidence, cause, advice)


def run_checks(
    checks: Sequence[tuple[Check[Any], Any]], *, show: Callable[[float], None] = lambda fraction: None
) -> list[Result]:
    """Run each check on its subject, in order. `show` is called with the fraction that is done before each.

    An error inside a check is a failure of that check, because the code that it calls is the run's own.
    """
    results = []
    for number, (check, subject) in enumerate(checks):
        show(number / len(checks))
        started = time.perf_counter()
        try:
            finding = check.run(subject)
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, the other checks may tell more
            lines = str(error).strip().splitlines() or ["no message"]
            cause = f"the check ended with {type(error).__name__}: {lines[0]}"
            finding = Finding("fail", {}, cause, "correct this first")
        results.append(Result(check.name, check.group, finding, time.perf_counter() - started))
    return results


def worst_of(results: Sequence[Result], verdict: Verdict) -> list[Result]:
    """Return the results with this verdict."""
    return [result for result in results if result.verdict == verdict]


def describe_counts(results: Sequence[Result]) -> str:
    """Return how many checks passed, warned, failed and were skipped, and the time of all."""
    words = {"pass": "passed", "warn": "warned", "fail": "failed", "skip": "skipped"}
    counts = {word: len(worst_of(results, verdict)) for verdict, word in words.items()}  # type: ignore[arg-type]
    shown = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{shown}, in {sum(result.seconds for result in results):.1f} s"


def describe_result(result: Result) -> str:
    """Return a result in one sentence: the cause, the evidence and the advice."""
    finding = result.finding
    numbers = describe_evidence(finding.evidence)
    cause = f"{finding.cause}{f' ({numbers})' if numbers else ''}"
    advice = f" {finding.advice[0].upper()}{finding.advice[1:]}." if finding.advice else ""
    return f"{result.name}: {cause}.{advice}"


def describe_evidence(evidence: Evidence) -> str:
    """Return the evidence as text, such as `before 0, after 0.31`."""
    return ", ".join(f"{name} {describe_number(value)}" for name, value in evidence.items())


def describe_number(value: float | int | str) -> str:
    """Return a number with three digits, a count with thousands separated, and text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def list_rows(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table: the name of a check; and its verdict, evidence, time if it is long, and cause."""
    for result in results:
        finding = result.finding
        took = f" [{result.seconds:.1f} s]" if result.seconds > SLOW_SECONDS else ""
        if finding.verdict == "pass":
            yield result.name, f"pass  {describe_evidence(finding.evidence)}{took}"
        else:
            sentence = describe_result(result).removeprefix(f"{result.name}: ")
            yield result.name, f"{finding.verdict}  {sentence}{took}"


def as_json(results: Sequence[Result], *, deep: bool, **facts: Any) -> dict[str, Any]:
    """Return the content of doctor.json."""
    return {
        "form": "deep" if deep else "short",
        **facts,
        "checks": [
            {"name": one.name, "group": one.group, "seconds": round(one.seconds, 3), **asdict(one.finding)}
            for one in results
        ],
    }
