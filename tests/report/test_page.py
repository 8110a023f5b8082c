"""The page: its content, its size, and that nothing in a folder can become markup."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_pages import HOSTILE, MEGABYTE, Page, build_page, page_of, plant, write_many_rows

from smollm2.cli.main import main
from smollm2.report.page import write_landscape_page
from smollm2.report.reading import read_run, read_runs
from smollm2.report.sections import SECTIONS
from smollm2.tracking.base import Fanout, Sample
from smollm2.tracking.jsonl import JsonlTracker


def test_the_page_has_every_section_in_order(run: Path) -> None:
    assert page_of(run).ids == [section.id for section in SECTIONS]
    assert {
        "summary",
        "curves",
        "samples",
        "diagnostics",
        "landscape",
        "data",
        "checks",
        "events",
        "config",
        "machine",
        "next",
    } == {section.id for section in SECTIONS}


@pytest.mark.parametrize(
    "text",
    [
        "All 400 steps are done; the training loss fell from 7.651 to 3.054.",
        "Validation is at 1.698 bits per byte (2.547 at first), and the run does not overfit.",
        "1 step skipped",
        "531,380, 3.67 characters each",
        "100.00% of the training tokens are in a window",
        "resuming from step_0200.pt",
        "stopped by SIGTERM after step 200",
        "nano.yaml:21",
        "PyTorch",
        "Resumed once.",
        "Unencodable bytes",
        "Latest sample, step 400",
        "Largest attention score before the softmax.",
        "below 50; above 100 attention sticks to one token",
        "smollm2 export",
        "--train_steps 800",
        "Every parameter at step 400",
        "3.2000 at the weights themselves",
    ],
)
def test_the_page_contains(run: Path, text: str) -> None:
    assert text in page_of(run).text


def test_the_page_names_no_address_outside_its_scripts(run: Path) -> None:
    html = build_page(read_runs([run]))
    without_scripts = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert "//" not in without_scripts.replace("</", "")
    assert "default-src 'none'" in html.replace("&#39;", "'")


def test_each_chart_has_a_sentence(run: Path) -> None:
    plots = [attrs for _, attrs in page_of(run).tags if attrs.get("class") == "plot"]
    assert len(plots) == 9
    assert all(attrs["role"] == "img" and re.search(r"\d", str(attrs["aria-label"])) for attrs in plots)


def test_samples_are_shown_first_middle_and_last(run: Path) -> None:
    headings = [text for text in page_of(run).texts if re.fullmatch(r"Step \d+", text)]
    assert headings == ["Step 50", "Step 250", "Step 400"] * 2


def test_a_landscape_has_a_page_in_the_style_of_the_report(run: Path, tmp_path: Path) -> None:
    step, landscape = read_run(run).landscape or (0, None)
    assert landscape
    write_landscape_page(landscape, step, tmp_path / "landscape.html")
    html = (tmp_path / "landscape.html").read_text(encoding="utf-8")
    page, report = Page(html), page_of(run)
    assert page.ids == ["landscape"] and page.scripts == report.scripts
    assert page.data == [data for data in report.data if "data" in data]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_folder_becomes_markup(run: Path, copy: Path, text: str) -> None:
    plant(copy, text)
    clean, page = page_of(run), page_of(copy)
    assert page.scripts == clean.scripts
    allowed = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in page.tags} <= allowed
    names = {name for _, attrs in page.tags for name in attrs}
    assert not {name for name in names if name.startswith("on")}
    assert not [
        attrs for tag, attrs in page.tags if tag in ("a", "link") and not str(attrs["href"]).startswith(("#", "data:,"))
    ]


@pytest.mark.parametrize("name", ["<b onclick=alert(1)>x<b>", "a'\"&amp;", "&lt;script&gt;"])
def test_a_runs_name_is_text(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run, tmp_path / name)
    page = page_of(tmp_path / name, run)
    assert name in page.text
    assert not [attrs for _, attrs in page.tags if "onclick" in attrs]
    assert page.data[0]["curves"][0]["name"] == name


def test_a_sample_with_hostile_text_arrives_in_the_data_whole(copy: Path) -> None:
    plant(copy, HOSTILE[1])
    rounds = next(data for data in page_of(copy).data if isinstance(data, list))
    assert [HOSTILE[1], HOSTILE[1]] in rounds[-1]["samples"]


def test_an_output_that_cannot_be_written_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "absent" / "x.html")]) == 6
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_hundred_thousand_rows_are_a_page_under_6_megabytes(tmp_path: Path) -> None:
    run = write_many_rows(tmp_path, 100_000)
    began = time.process_time()
    html = build_page(read_runs([run]))
    assert time.process_time() - began < 20
    assert len(html.encode()) < 6 * MEGABYTE
    assert all(len(curve["y"]) <= 2000 for data in Page(html).data if "curves" in data for curve in data["curves"])


def test_a_folder_with_many_samples_events_and_diagnostics_is_a_page_under_6_megabytes(copy: Path) -> None:
    tracker = Fanout([JsonlTracker(copy, 10**6, print)])
    for step in range(400, 1400):
        tracker.log_text([Sample(f"prompt {i}", "word " * 400) for i in range(4)], step)
        tracker.log_event("skip", "x" * 5000, step)
        tracker.log_event("checkpoint", "x" * 5000, step)
    tracker.close()
    names = {f"model.layers.{layer}.{part}.weight": 0.123456 for layer in range(80) for part in range(9)}
    diagnostics = {"gradient_norms": names, "weight_norms": names, "update_ratios": names, "clipped": 0.1}
    blocks = {f"model.layers.{layer}": {"rms": 1.234, "max_abs": 2.345, "dead_units": 0.5} for layer in range(80)}
    with (copy / "diagnostics.jsonl").open("a") as file:
        for step in range(400, 700):
            file.write(json.dumps({"step": step, **diagnostics, "activations": blocks}) + "\n")
    assert len(build_page(read_runs([copy])).encode()) < 6 * MEGABYTE


def test_the_command_writes_the_page_to_the_path_that_it_prints(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, place in [
        ([str(run)], run / "report.html"),
        ([str(run), str(run)], Path("comparison.html")),
        ([str(run), "--output", "x.html"], Path("x.html")),
    ]:
        assert main(["report", *arguments]) == 0
        assert capsys.readouterr().out == f"{place}: open it in a browser\n"
        assert place.read_text(encoding="utf-8").startswith("<!doctype html>")
    (run / "report.html").unlink()


def test_the_command_loads_neither_torch_nor_numpy(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from smollm2.cli.main import main; "
        f"assert main(['report', {str(run)!r}, '--output', {str(tmp_path / 'x.html')!r}]) == 0; "
        f"assert 'plotly' in sys.modules; assert main(['report', {str(run)!r}, '--terminal']) == 0; "
        "print(sorted({'torch', 'numpy', 'transformers', 'accelerate'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONIOENCODING": "utf-8"}
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
