"""docs/promises.md and the suite agree: every test that it names is there, every promise stands there once."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
WATCHING = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([A-H][0-9]+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)))


def find_tests(file: str) -> dict[str, bool]:
    """The tests of a file, and whether they are slow."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {f.name: any("mark.slow" in ast.unparse(d) for d in f.decorator_list) for f in functions}


def test_at_least_forty_promises_stand_there_each_once() -> None:
    ids = [identity for identity, _, _ in ROWS]
    assert len(ids) >= 40
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("identity", "promise", "tests"), ROWS, ids=[row[0] for row in ROWS])
def test_each_promise_is_a_sentence_with_a_test(identity: str, promise: str, tests: str) -> None:
    assert promise.endswith(".") and re.search(r"`tests/[\w/]+\.py::test_\w+`", tests)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_each_test_that_is_named_exists_and_is_called_slow_where_it_is(file: str, name: str) -> None:
    found = find_tests(file)
    assert name in found
    assert found[name] == (f"`{file}::{name}` (slow)" in PAGE)


@pytest.mark.parametrize(("file", "name"), sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", WATCHING))))
def test_each_test_that_the_page_on_watching_names_exists(file: str, name: str) -> None:
    assert name in find_tests(file)


def test_every_promise_that_a_test_claims_is_listed() -> None:
    claimed = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.FunctionDef)
                and node.name.startswith("test_")
                and (reported := ast.get_docstring(node))
            ):
                found = re.match(r"(?:Promises? )?([A-H][0-9]+(?:(?:,| and|, and) [A-H][0-9]+)*)\b", reported)
                claimed |= set(re.findall(r"[A-H][0-9]+", found[1])) if found else set()
    assert claimed <= {identity for identity, _, _ in ROWS}
