"""The files that a newcomer looks for: they name what exists, and say one version, one licence and one address."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from runs import ROOT

import smollm2

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GUIDES = [path for name in ("CONTRIBUTING.md", "docs/how-it-works.md") if (path := ROOT / name).exists()]


def test_the_version_is_written_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "smollm2/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", smollm2.__version__)
    assert f"## [{smollm2.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_address_of_the_repository_is_the_same() -> None:
    address = PROJECT["project"]["urls"]["Repository"]
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / ".github").rglob("*.yml"), ROOT / "pyproject.toml"]
    found = {url for path in files for url in re.findall(r"https://github\.com/smollm2[\w-]*/[\w-]+", path.read_text())}
    assert found == {address}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_file_that_a_guide_names_exists(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:smollm2|tests|docs|scripts|benchmarks|examples|configs|\.ci)/[\w./-]*)", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_hooks_and_the_workflow_run_what_ci_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for tool in ("ruff check", "ruff format --check", "mypy"):
        assert f"-m {tool}" in hooks and f"-m {tool}" in script
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["ci"]["steps"][-1] == {"run": ".ci/run"}


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert (ROOT / "smollm2" / "py.typed").exists()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_every_name_that_the_tour_mentions_is_defined_in_the_package() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "smollm2").rglob("*.py"))
    named = set(re.findall(r"`([A-Z][A-Za-z]+|[a-z]+(?:_[a-z]+)+)`", text)) - {"input_ids"}
    assert len(named) > 8
    assert [name for name in sorted(named) if not re.search(rf"^(?:def|class) {name}\b", code, re.MULTILINE)] == []
