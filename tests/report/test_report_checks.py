"""The section about the checks: doctor.json, in a table with what is wrong first."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE, page_of

from smollm2.report.reading import read_run

CHECK: dict[str, Any] = {
    "name": "causality",
    "group": "model",
    "seconds": 0.1,
    "verdict": "pass",
    "evidence": {"its own by": 0.25, "count": 3, "kind": "text"},
    "cause": "",
    "advice": "",
}


def write_checks(run: Path, *changes: dict[str, Any]) -> None:
    content = {"form": "short", "step": 0, "checks": [{**CHECK, **one} for one in changes]}
    (run / "doctor.json").write_text(json.dumps(content))


def test_failures_come_first_with_their_cause_and_the_next_step(copy: Path) -> None:
    failed = {
        "name": "batch",
        "verdict": "fail",
        "cause": "a sequence sees another",
        "advice": "look at the shapes",
        "evidence": {},
    }
    write_checks(copy, {}, failed, {"name": "modes", "verdict": "skip", "cause": "it has dropout"})
    text = page_of(copy).text
    assert "Short form, before step 1: 1 failed, 1 passed, 1 skipped." in text
    assert text.index("a sequence sees another. look at the shapes") < text.index("its own by 0.25, count 3, kind text")


def test_a_run_without_checks_says_so(copy: Path) -> None:
    assert "No checks were recorded. Make them with smollm2 doctor" in page_of(copy).text
    assert read_run(copy).problems == []


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.isprintable()])
def test_what_a_check_says_is_text(copy: Path, text: str) -> None:
    write_checks(copy, {"verdict": "warn", "cause": text})
    assert text in page_of(copy).text


@pytest.mark.parametrize(
    "content",
    [
        {"checks": 5},
        {"form": "short", "step": 0, "checks": [5]},
        {"form": 5, "step": 0, "checks": []},
        {"form": "short", "step": 0, "checks": [{**CHECK, "verdict": "<b>"}]},
        {"form": "short", "step": 0, "checks": [{**CHECK, "verdict": ["pass"]}]},
        {"form": "short", "step": 0, "checks": [{**CHECK, "evidence": {"a": [1]}}]},
        {"form": "short", "step": None, "checks": []},
    ],
)
def test_a_damaged_file_is_named_and_the_page_built_without_it(content: object, copy: Path) -> None:
    (copy / "doctor.json").write_text(json.dumps(content))
    [problem] = read_run(copy).problems
    assert problem.startswith("doctor.json: is not a valid list of checks")
    assert "No checks were recorded" in page_of(copy).text
