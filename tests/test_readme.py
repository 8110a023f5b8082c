"""What README.md shows is what happens: its code runs, its commands parse, its tree and its output are the real ones."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

from smollm2.cli.main import build_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CODE = [text for language, text in FENCED if language == "python"]
BLOCKS = [text for language, text in FENCED if not language]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the README's Python code prints, in an empty folder."""
    folder = tmp_path_factory.mktemp("readme")
    done = subprocess.run([sys.executable, "-c", CODE[0]], cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pages(text: str) -> list[str]:
    """The names of the rows of start and end pages."""
    return re.findall(r"^  (\S[a-z ]*?)  +\S", text, re.MULTILINE)


@pytest.mark.slow
def test_its_output_has_the_lines_that_a_run_has(output: str) -> None:
    shown = BLOCKS[0]
    assert pages(shown) == pages(output)
    report = (
        r"step \d+/\d+  loss [\d.]+  smoothed_loss [\d.]+  learning_rate \S+  grad_norm [\d.]+  tokens_per_second \d+"
    )
    assert re.search(report, shown)
    assert re.search(report, output)


def commands() -> list[str]:
    """The flags of each training command in the table."""
    rows = re.findall(r"^\| `(?:python train.py|\.\.\.) ([^`]*)`", README, re.MULTILINE)
    assert len(rows) >= 6
    return rows


@pytest.mark.parametrize("flags", commands())
def test_its_commands_are_understood(flags: str) -> None:
    _, unknown = build_parser().parse_known_args(["train", *shlex.split(flags)])
    assert unknown == []


def test_its_tree_names_every_module() -> None:
    tree = next(block for block in BLOCKS if block.startswith("smollm2/"))
    named = set(re.findall(r"(\w+)(?:\.py|/)", tree)) - {"smollm2"}
    package = ROOT / "smollm2"
    here = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    here |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert named == here


def test_the_files_it_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_its_config_error_is_the_real_one(tmp_path: Path) -> None:
    shown = next(block for block in BLOCKS if block.startswith("config.yaml:14"))
    (tmp_path / "config.yaml").write_text("training:\n" + "\n" * 12 + "  learnin_rate: 3e-4\n")
    done = subprocess.run([sys.executable, "-m", "smollm2", "train"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.removeprefix("error: ")) == (2, shown)
