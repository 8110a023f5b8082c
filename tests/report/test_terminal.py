"""Curves in the terminal."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import plant, with_rows

from smollm2.report.reading import read_run
from smollm2.report.terminal import draw_run


def test_the_terminal_loads_no_plotly(run: Path) -> None:
    code = f"import sys; from smollm2.cli.main import main; main(['report', {str(run)!r}, '--terminal']); print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize(
    ("encoding", "drawn"), [("utf-8", "\u2800-\u28ff"), ("ascii", "*"), ("latin-1", "*"), ("nonsense", "*")]
)
@pytest.mark.parametrize("width", [5, 40, 80, 200])
def test_curves_in_the_terminal_fit_its_width_and_encoding(run: Path, encoding: str, drawn: str, width: int) -> None:
    lines = draw_run(read_run(run), width, encoding)
    curve = [line for line in lines if re.search("[|\u2502]", line)]
    assert len(curve) == 36
    assert all(len(line) <= max(20, width) for line in curve)
    assert re.search(f"[{drawn}]", "".join(curve))
    if encoding in ("ascii", "latin-1"):
        "".join(curve).encode(encoding)


def test_a_falling_loss_falls_in_the_terminal(tmp_path: Path) -> None:
    run = with_rows(tmp_path / "run", [{"step": step, "loss": 100.0 - step} for step in range(100)])
    rows = [line.partition("|")[2] for line in draw_run(read_run(run), 60, "ascii") if "|" in line]
    assert rows[0].startswith("*") and rows[-1].endswith("*")
    firsts = [row.index("*") for row in rows]
    assert firsts == sorted(firsts)


def test_the_terminal_receives_no_control_character(copy: Path) -> None:
    plant(copy, "\x1b[31m")
    assert "\x1b" not in "\n".join(draw_run(read_run(copy), 80, "utf-8"))
