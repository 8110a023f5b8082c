"""The report: what it reads of a run folder, what it draws, and that nothing in a folder can become markup."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run
from runs import tiny_config, write_tiny

from smollm2.cli.main import main
from smollm2.errors import DataError, Interrupted
from smollm2.report.compare import COMPARISON, comparable_metric, compare_best
from smollm2.report.curves import thin
from smollm2.report.page import page_chunks, write_landscape_page
from smollm2.report.reading import RunFolder, read_run, read_runs
from smollm2.report.sections import SECTIONS
from smollm2.report.terminal import draw_run
from smollm2.report.tracker import ReportTracker
from smollm2.report.verdict import describe_fit, notes_of, status_of, verdict_of
from smollm2.tracking.base import Fanout, Fence, Sample
from smollm2.tracking.jsonl import JsonlTracker
from smollm2.training.loop import train

MEGABYTE = 10**6


class Page(HTMLParser):
    """A page parsed as by a browser: elements, texts, scripts, and the data of its figures."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.data: list[Any] = []
        self.inside = ""
        self.feed(html)
        self.close()
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        self.is_data = tag == "script" and ("type", "application/json") in attrs

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.data.append(json.loads(data)) if self.is_data else self.scripts.append(data)
        elif not self.inside:
            self.texts.append(data)

    @property
    def ids(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.tags if tag == "section"]


def build_page(runs: Sequence[RunFolder]) -> str:
    return b"".join(page_chunks(runs)).decode()


def page_of(*runs: Path) -> Page:
    return Page(build_page(read_runs(runs)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything in it."""
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


# Content of the page


def test_the_page_has_every_section_in_order(run: Path) -> None:
    assert page_of(run).ids == [section.id for section in SECTIONS]
    assert {
        "summary",
        "curves",
        "samples",
        "diagnostics",
        "landscape",
        "data",
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
    assert len(plots) == 8
    assert all(attrs["role"] == "img" and re.search(r"\d", str(attrs["aria-label"])) for attrs in plots)


def test_the_data_of_the_loss_chart_are_the_rows(run: Path) -> None:
    loss = page_of(run).data[0]["curves"][0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert loss["step"] == [row["step"] for row in rows]
    assert loss["tokens"] == [row["tokens"] for row in rows]
    assert loss["y"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    seconds = sum(20_480 / row["tokens_per_second"] for row in rows)
    assert loss["seconds"][-1] == pytest.approx(seconds, rel=1e-6)


def test_the_heat_map_has_a_layers_norm_over_its_parameters(run: Path) -> None:
    heat = next(data for data in page_of(run).data if isinstance(data, dict) and "measures" in data)
    measures = {one["name"]: one for one in heat["measures"]}
    assert list(measures) == [
        "gradient norm",
        "update ratio",
        "weight norm",
        "rms",
        "max_abs",
        "max_attention_logit",
        "dead_units",
    ]
    row = json.loads((run / "diagnostics.jsonl").read_text().splitlines()[-1])
    norms = [norm for name, norm in row["gradient_norms"].items() if ".layers.2." in name]
    index = measures["gradient norm"]["rows"].index("layers.2")
    assert measures["gradient norm"]["values"][index][-1] == pytest.approx(math.hypot(*norms), rel=1e-3)
    assert measures["max_abs"]["values"][3][-1] == pytest.approx(
        row["activations"]["model.layers.3"]["max_abs"], rel=1e-3
    )


# One definition of each number


def summary_of(page: Page) -> dict[str, str]:
    """Return the key figures by name."""
    names = [page.texts.index(name) for name in ("Training loss", "Best validation loss", "Bits per byte", "Ran for")]
    return {page.texts[at]: page.texts[at + 1] for at in names}


def test_the_training_loss_is_that_of_the_last_report_everywhere(run: Path) -> None:
    page = page_of(run)
    last = [loss for _, loss in read_run(run).points("loss")][-1]
    assert summary_of(page)["Training loss"] == f"{last:.3f}"
    assert f"the training loss fell from 7.651 to {last:.3f}." in page.text
    assert f"Training loss 7.651 at step 10, {last:.4g} at 400" in page.text
    assert page.data[0]["curves"][0]["y"][-1] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize(("reports", "smoothing"), [(13, "0.0"), (99, "0.0"), (100, "0.6")])
def test_short_runs_are_not_smoothed(tmp_path: Path, reports: int, smoothing: str) -> None:
    page = page_of(with_rows(tmp_path / "run", [{"step": step, "loss": 2.0} for step in range(1, reports + 1)]))
    (slider,) = [attrs for tag, attrs in page.tags if attrs.get("name") == "smoothing"]
    assert slider["value"] == smoothing


def test_a_run_without_validation_has_a_sentence_and_no_number(tmp_path: Path) -> None:
    """The text is too short for a validation split."""
    folder = with_rows(tmp_path / "run", [{"step": step, "loss": 2.0, "validation_bpb": None} for step in (1, 2, 3)])  # type: ignore[dict-item]
    event = {"step": 0, "kind": "data", "message": "", "validation_tokens": 0, "train_tokens": 5, "tokens": 5}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    page = page_of(folder)
    assert "There was no validation, because the text is too short for a validation split." in page.text
    assert "none: the text is too short" in page.text
    assert summary_of(page)["Best validation loss"] == summary_of(page)["Bits per byte"] == "–"
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


# Marks, samples and diagnostics


def test_warmup_resumes_skips_and_the_best_checkpoint_are_marked_on_the_loss(tmp_path: Path) -> None:
    marks = page_of(write_run(tmp_path, training__warmup_steps="45")).data[0]["marks"]
    assert marks["warmup"]["step"] == 45 and marks["warmup"]["tokens"] == 45 * 2048
    assert [place["step"] for place in marks["resume"]] == [200]
    assert [place["step"] for place in marks["skip"]] == [200]
    assert marks["best"]["step"] == 400 and marks["best"]["y"] == pytest.approx(4.227, abs=1e-3)


def test_samples_are_shown_first_middle_and_last(run: Path) -> None:
    headings = [text for text in page_of(run).texts if re.fullmatch(r"Step \d+", text)]
    assert headings == ["Step 50", "Step 250", "Step 400"] * 2


def test_a_diagnostic_outside_its_healthy_range_is_marked(copy: Path) -> None:
    path = copy / "diagnostics.jsonl"
    *rows, last = path.read_text().splitlines()
    row = json.loads(last)
    row["activations"]["model.layers.3"]["max_attention_logit"] = 120
    path.write_text("\n".join([*rows, json.dumps(row)]) + "\n")
    texts = [text.strip() for text in page_of(copy).texts if text.strip()]
    assert texts[texts.index("high") - 1] == "15 to 120" and texts.count("high") == 1


def test_a_landscape_has_a_page_in_the_style_of_the_report(run: Path, tmp_path: Path) -> None:
    step, landscape = read_run(run).landscape or (0, None)
    assert landscape
    write_landscape_page(landscape, step, tmp_path / "landscape.html")
    html = (tmp_path / "landscape.html").read_text(encoding="utf-8")
    page, report = Page(html), page_of(run)
    assert page.ids == ["landscape"] and page.scripts == report.scripts
    assert page.data == [data for data in report.data if "data" in data]


# The verdict


def with_rows(folder: Path, rows: list[dict[str, float]], train_steps: int = 100) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"training:\n  train_steps: {train_steps}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "events.jsonl").write_text("")
    (folder / "samples.jsonl").write_text("")
    (folder / "diagnostics.jsonl").write_text("")
    return folder


def rows_of(training: Callable[[int], float], validation: Callable[[int], float]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, 91):
        rows.append({"step": step, "loss": training(step)})
        if step % 10 == 0:
            rows.append({"step": step, "validation_loss": validation(step)})
    return rows


def rise(step: int) -> float:
    return 3 + abs(step - 40) / 50


ROSE = "the validation loss rose by 33% since step 40"
MEMORIZED = "The training loss is 48% below the validation loss: part of the text is memorized."


@pytest.mark.parametrize(
    ("training", "validation", "clause", "note"),
    [
        (lambda step: 4 - step / 50, lambda step: 4 - step / 60, ", and the run does not overfit", ""),
        (
            lambda step: 4 - step / 50,
            rise,
            f"; the run overfits: {ROSE}, while the training loss fell",
            "Use more text or fewer steps, or the best checkpoint.",
        ),
        (rise, rise, f"; the run got worse: {ROSE}", "The training loss rose too: a lower learning rate may help."),
        (lambda step: 3 - step / 60, lambda step: 3.0 + step / 10**4, ", and the run does not overfit", MEMORIZED),
    ],
    ids=["falling", "overfitting", "worse", "memorized"],
)
def test_whether_it_overfits(
    tmp_path: Path, training: Callable[[int], float], validation: Callable[[int], float], clause: str, note: str
) -> None:
    run = read_run(with_rows(tmp_path / "run", rows_of(training, validation)))
    assert describe_fit(run) == clause
    assert notes_of(run) == ([note] if note else [])


def test_the_last_validation_of_the_whole_split_does_not_count_as_a_rise(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step": step, "validation_loss": 4 - step / 50} for step in (20, 40, 60, 80)]
    rows += [{"step": step, "loss": 4 - step / 50} for step in (1, 99)]
    rows.append({"step": 100, "validation_loss": 3.9})
    assert "does not overfit" in describe_fit(read_run(with_rows(tmp_path / "run", rows)))


@pytest.mark.parametrize(
    ("events", "lock", "status"),
    [
        (["start", "done"], False, "finished"),
        (["start", "stopped"], False, "stopped"),
        (["start", "failed"], True, "failed"),
        (["start"], True, "running"),
        (["start", "stopped", "start"], False, "interrupted"),
        ([], False, "interrupted"),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, events: list[str], lock: bool, status: str) -> None:
    run = with_rows(tmp_path / "run", [{"step": 5, "loss": 2.0}])
    rows = [{"step": 5, "kind": kind, "message": "", "time": 1.0} for kind in events]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if lock:
        from smollm2.storage.locks import lock_folder

        with lock_folder(run):
            assert status_of(read_run(run)) == status
    else:
        assert status_of(read_run(run)) == status


# Thinning


@pytest.mark.parametrize("count", [1, 2000, 2001, 100_000])
def test_thinning_keeps_the_ends_and_every_extreme(count: int) -> None:
    noise = random.Random(count)
    values = [noise.gauss(0, 1) for _ in range(count)]
    spikes = sorted({0, count // 3, count // 2, count - 1})
    for number, index in enumerate(spikes):
        values[index] = (-1) ** number * (100 + number)
    kept, means = thin(values, 2000)
    assert len(kept) <= 2000 and len(means) == len(kept)
    assert kept == sorted(set(kept))
    assert set(spikes) <= set(kept)
    assert min(values) <= min(means) <= max(means) <= max(values)


def test_thinning_keeps_the_minimum_and_maximum_of_each_bucket() -> None:
    noise = random.Random(1)
    values = [noise.gauss(0, 1) for _ in range(10_002)]
    kept, _ = thin(values, 202)
    for start in range(1, 10_001, 100):
        bucket = range(start, start + 100)
        assert {min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)} <= set(kept)


def test_missing_numbers_are_not_points() -> None:
    assert thin([math.nan, 1.0, math.nan, 2.0], 4) == ([1, 3], [1.0, 2.0])


# Injection

HOSTILE = [
    "<script>document.title='x'</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><svg onload=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "&lt;b&gt; & &#60;",
    "\u2028\u202eabc\x00\x1b[31m",
    "\ud800 half a letter",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
]


def plant(run: Path, text: str) -> None:
    """The text wherever a folder holds text."""
    tracker = Fanout([JsonlTracker(run, 10**6, print)])
    tracker.log_text([Sample(text, text)], 400)
    tracker.log_event(text, text, 400, reason=text)
    tracker.log_event("data", "", 400, input=text, tokenizer=text, tokens=text)
    tracker.log_event("start", "", 400, device=text, torch=text)
    tracker.log_event("failed", "", 400, reason=text)
    tracker.close()
    quoted = json.dumps(text)
    with (run / "config.yaml").open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write(f"mine:\n  {json.dumps(text)}: {quoted}  # {quoted}\n")
    (run / "best.json").write_text(json.dumps({"file": text}))
    *_, last = (run / "diagnostics.jsonl").read_text().splitlines()
    look = json.loads(last)
    for part in ("gradient_norms", "weight_norms", "update_ratios"):
        look[part][text] = 1.0
    look["activations"][text] = {"rms": 1.0}
    with (run / "diagnostics.jsonl").open("a") as file:
        file.write(json.dumps(look) + "\n")


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


# Bad folders


def spoil_with_garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5000) + b"\n")


def spoil_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def spoil_as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = [
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "diagnostics.jsonl",
    "landscape.json",
    "best.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "spoil", [Path.unlink, spoil_with_garbage, spoil_as_folder, lambda path: path.write_bytes(b"")]
)
def test_a_file_that_is_absent_or_damaged_is_named_and_the_page_is_built(
    copy: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    """D10."""
    spoil(copy / name)
    page = page_of(copy)
    assert page.ids == [section.id for section in SECTIONS]
    is_optional = spoil is Path.unlink and name in ("landscape.json", "best.json")
    is_empty = (copy / name).is_file() and not (copy / name).read_bytes() and name.endswith("l")
    is_named = any(name in problem for problem in read_run(copy).problems)
    assert is_named == (not is_optional and not (is_empty and name != "config.yaml"))
    assert is_named == (f"{name}" in page.text.partition("Some files could not be read")[2][:400])


ROWS = [
    b"{",
    b"[1]",
    b"null",
    b'{"step": -1}',
    b'{"step": true, "loss": 1}',
    b'{"step": "5"}',
    b'{"step": 5, "loss": "low"}',
    b'{"step": 5, "loss": [1]}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
    b"\xff\xfe",
]


def test_damaged_lines_are_counted_and_the_others_kept(copy: Path) -> None:
    before = read_run(copy)
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(row + b"\n" for row in ROWS))
    after = read_run(copy)
    assert repr(after.metrics) == repr(before.metrics)
    lines = len((copy / "metrics.jsonl").read_bytes().splitlines()) - len(ROWS) + 1
    assert after.problems == [f"metrics.jsonl:{lines}: {len(ROWS)} damaged lines are omitted"]


def test_a_torn_last_line_is_omitted_silently(copy: Path) -> None:
    spoil_by_cutting(copy / "metrics.jsonl")
    assert read_run(copy).problems == []
    assert len(read_run(copy).metrics["step"]) == len(read_run(copy).metrics["loss"])


@pytest.mark.parametrize(
    "row",
    [
        '{"step": 1, "kind": "skip"}',
        '{"step": 1, "kind": 5, "message": "x"}',
        '{"step": 1, "kind": "skip", "message": "x", "time": "noon"}',
    ],
)
def test_an_event_of_another_form_is_counted(copy: Path, row: str) -> None:
    (copy / "events.jsonl").write_text(row + "\n")
    assert read_run(copy).problems == ["events.jsonl:1: 1 damaged line is omitted"]


def test_rows_of_two_runs_in_one_file_are_drawn_by_step(copy: Path) -> None:
    rows = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(rows + rows)
    steps = read_run(copy).metrics["step"]
    assert list(steps) == sorted(steps)


def test_numbers_beyond_all_bounds_draw_a_page(copy: Path) -> None:
    rows = [
        {"step": step, "loss": value, "tokens": 1e300, "tokens_per_second": 1e-300}
        for step, value in enumerate([1e308, -1e308, 5e-324, 0.0])
    ]
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "loss": NaN}\n{"step": 9, "loss": 1e999}\n'
    )
    assert page_of(copy).ids


def test_a_folder_that_is_not_a_run_folder_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="neither metrics"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path / "absent")]) == 3
    assert "it is not a folder. Name the --save_dir of a run." in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "absent" / "x.html")]) == 6
    assert len(capsys.readouterr().err.splitlines()) == 1


# Size


def write_many_rows(folder: Path, count: int) -> Path:
    """A run with so many reports."""
    run, noise = write_run(folder, reports=8), random.Random(0)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            row = {
                "step": step,
                "tokens": step * 524_288,
                "epoch": 0.1,
                "loss": 3 + noise.random(),
                "learning_rate": 1e-4,
            }
            row |= {"grad_norm": noise.random(), "skipped": 0, "tokens_per_second": 52_428.8 * (1 + noise.random())}
            file.write(json.dumps(row) + "\n")
            if step % 100 == 0:
                file.write(
                    json.dumps({"step": step, "validation_loss": 3 + noise.random(), "validation_bpb": 1.0}) + "\n"
                )
    (run / "config.yaml").write_text(f"training:\n  train_steps: {count}\n")
    return run


def test_a_hundred_thousand_rows_are_a_page_under_6_megabytes(tmp_path: Path) -> None:
    run = write_many_rows(tmp_path, 100_000)
    began = time.process_time()
    html = build_page(read_runs([run]))
    assert time.process_time() - began < 20
    assert len(html.encode()) < 6 * MEGABYTE
    assert all(len(curve["y"]) <= 2000 for data in Page(html).data if "curves" in data for curve in data["curves"])


def test_a_folder_with_much_of_everything_is_a_page_under_6_megabytes(copy: Path) -> None:
    tracker = Fanout([JsonlTracker(copy, 10**6, print)])
    for step in range(400, 1400):
        tracker.log_text([Sample(f"prompt {i}", "word " * 400) for i in range(4)], step)
        tracker.log_event("skip", "x" * 5000, step)
        tracker.log_event("checkpoint", "x" * 5000, step)
    tracker.close()
    names = {f"model.layers.{layer}.{part}.weight": 0.123456 for layer in range(80) for part in range(9)}
    look = {"gradient_norms": names, "weight_norms": names, "update_ratios": names, "clipped": 0.1}
    blocks = {f"model.layers.{layer}": {"rms": 1.234, "max_abs": 2.345, "dead_units": 0.5} for layer in range(80)}
    with (copy / "diagnostics.jsonl").open("a") as file:
        for step in range(400, 700):
            file.write(json.dumps({"step": step, **look, "activations": blocks}) + "\n")
    assert len(build_page(read_runs([copy])).encode()) < 6 * MEGABYTE


# Several runs


def test_runs_are_compared_key_by_key_and_the_best_is_marked(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, name="other", training__learning_rate="1e-3", training__seed="7")
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 400, "validation_loss": 1.5, "validation_bpb": 0.5}) + "\n")
    page = page_of(run, other)
    assert page.ids == [section.id for section in COMPARISON]
    assert {"training.learning_rate", "training.seed", "0.001", "0.003"} <= set(page.texts)
    assert "training.optimizer" not in page.text
    assert page.texts[page.texts.index(" (best)") - 1] == "other"
    assert (
        "other is better than run: its best validation loss is 1.500 instead of 4.227, lower by 2.727 (64.5%)."
        in page.text
    )
    assert {curve["run"] for curve in page.data[0]["curves"]} == {"run", "other"}


def with_time(folder: Path, seconds: float) -> None:
    """Give a run a start and an end that many seconds apart, and the same data as the others."""
    data = {"step": 0, "kind": "data", "message": "", "tokens": 100, "validation_tokens": 10, "vocab_size": 5}
    events = [("start", 0, 1000.0), ("done", 100, 1000.0 + seconds)]
    rows = [data, *({"step": step, "kind": kind, "message": "", "time": time} for kind, step, time in events)]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compared(tmp_path: Path, first: Callable[[int], float], second: Callable[[int], float]) -> list[str]:
    """Return the sentences about two runs that validate at steps 10 to 90."""
    for name, losses, seconds in (("a", first, 90.0), ("b", second, 60.0)):
        rows = rows_of(losses, losses)
        for row in rows:
            row |= {"tokens": row["step"] * 10, "tokens_per_second": 10.0} if "loss" in row else {}
        with_time(with_rows(tmp_path / name, rows), seconds)
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    return compare_best(runs, comparable_metric(runs))


def test_the_comparison_names_the_better_run_the_difference_and_the_time(tmp_path: Path) -> None:
    assert compared(tmp_path, lambda step: 4 - step / 50, lambda step: 4 - step / 60) == [
        "a is better than b: its best validation loss is 2.200 instead of 2.500, lower by 0.300 (12.0%).",
        "It is lower at each of the 9 validations that both have, by 0.033 to 0.300.",
        "It ran for 1 min 30 s instead of 1 min 0 s (50% longer), and reached 2.500 after 1 min 20 s of training.",
    ]


def test_a_difference_that_changes_its_sign_is_not_clear(tmp_path: Path) -> None:
    sentences = compared(
        tmp_path, lambda step: 4 - step / 50, lambda step: 4 - step / 50 + (0.1 if step > 50 else -0.1)
    )
    assert sentences[1] == "It is lower at 4 of the 9 validations that both have: the difference is not clear."


def test_runs_on_different_data_are_compared_by_bits_per_byte(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, name="other")
    text = (other / "events.jsonl").read_text()
    (other / "events.jsonl").write_text(text.replace('"vocab_size": 4096', '"vocab_size": 257'))
    assert comparable_metric(read_runs([run, run])) == "validation_loss"
    assert comparable_metric(read_runs([run, other])) == "validation_bpb"


def test_runs_with_the_same_folder_name_are_distinguished(run: Path, copy: Path) -> None:
    names = [one.name for one in read_runs([run, copy])]
    assert len(set(names)) == 2 and all(name.endswith("/run") for name in names)


def test_many_runs_are_a_page_under_6_megabytes(tmp_path: Path) -> None:
    run = write_many_rows(tmp_path, 5000)
    assert len(build_page(read_runs([run] * 30)).encode()) < 6 * MEGABYTE


# The command


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


def test_the_terminal_loads_no_plotly(run: Path) -> None:
    code = f"import sys; from smollm2.cli.main import main; main(['report', {str(run)!r}, '--terminal']); print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize(
    ("encoding", "drawn"), [("utf-8", "\u2800-\u28ff"), ("ascii", "*"), ("latin-1", "*"), ("nonsense", "*")]
)
@pytest.mark.parametrize("width", [5, 40, 80, 200])
def test_curves_in_the_terminal_fit_it_and_its_encoding(run: Path, encoding: str, drawn: str, width: int) -> None:
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


def test_the_terminal_is_sent_no_control_character(copy: Path) -> None:
    plant(copy, "\x1b[31m")
    assert "\x1b" not in "\n".join(draw_run(read_run(copy), 80, "utf-8"))


# In a run


def test_a_run_leaves_its_page_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path))
    page = Page((tmp_path / "checkpoints" / "report.html").read_text(encoding="utf-8"))
    assert page.ids == [section.id for section in SECTIONS]
    assert "All 12 steps are done; " in page.text
    assert "Some files could not be read" not in page.text
    assert f"report                {tmp_path / 'checkpoints' / 'report.html'}" in capsys.readouterr().out


def test_a_run_whose_validation_has_no_bytes_logs_no_bits_per_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The validation split of a very short text is the end of text alone, which has no bytes."""
    write_tiny(tmp_path, text="hi there\n")
    train(tiny_config(tmp_path, training__train_steps=2))
    rows = (tmp_path / "checkpoints" / "metrics.jsonl").read_text()
    assert "null" not in rows and "validation_bpb" not in rows
    assert not re.search(r"\bnan\b", capsys.readouterr().out, re.IGNORECASE)
    page = Page((tmp_path / "checkpoints" / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


def test_the_page_of_a_stopped_run_reports_the_stop(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, training__train_steps=10**6, training__save_interval=10**6, training__time_limit=1))
    run = read_run(tmp_path / "checkpoints")
    assert status_of(run) == "stopped"
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert f"The run was stopped at step {run.last_step:,} of 1,000,000 and can be resumed" in page.text
    assert f"training.time_limit is reached after step {run.last_step}" in page.text
    assert "--resume auto" in page.text


def test_the_page_is_written_at_evaluations_but_seldom(run: Path, copy: Path) -> None:
    page = copy / "report.html"
    tracker = Fanout([ReportTracker(copy, seconds_between=0.0)])
    tracker.log({"loss": 1.0}, 10)
    assert not page.exists()
    tracker.log({"validation_loss": 1.0}, 10)
    assert page.exists()
    page.unlink()
    tracker.log({"validation_loss": 1.0}, 20)
    assert not page.exists()  # the first took longer than a hundredth of the time since
    tracker.close()
    assert page.exists()


def test_a_page_without_news_is_not_written_again(copy: Path) -> None:
    ReportTracker(copy).close()
    assert not (copy / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_line_and_ends_nothing(copy: Path) -> None:
    (copy / "report.html").mkdir()
    (copy / "report.html" / "x").write_text("")
    reported: list[str] = []
    fence = Fence("report.html", lambda: ReportTracker(copy), reported.append)
    Fanout([fence]).log({"loss": 1.0}, 400)
    fence.close()
    assert len(reported) == 1 and reported[0].startswith("report.html: turned off after an error (ResourceError: ")


CLOCK = {"seconds", "tokens_per_second"}


def timeless(run: Path) -> tuple[object, ...]:
    """Return a page without what depends on the clock and on the resume itself."""
    found = read_run(run)
    page = page_of(run)
    curves = [
        [{name: value for name, value in curve.items() if name not in CLOCK} for curve in data["curves"]]
        for data in page.data
        if "curves" in data and data["title"] != "tokens per second"
    ]
    events = [
        {name: value for name, value in event.items() if name not in ("time", "seconds")}
        for event in found.events
        if event["kind"] not in ("data", "start", "stopped", "resume")
    ]
    data = {key: value for key, value in (found.latest("data") or {}).items() if key not in ("time", "step")}
    others = [data for data in page.data if "curves" not in data]
    return verdict_of(found), curves, others, events, data, found.settings, found.best, page.ids


def test_a_stopped_and_resumed_run_has_the_page_of_one_that_was_not(tmp_path: Path) -> None:
    """B7."""
    write_tiny(tmp_path)
    train(tiny_config(tmp_path))
    whole = timeless(tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("step_*.pt"):
        if path.name != "step_0004.pt":
            path.unlink()
    train(tiny_config(tmp_path), resume="auto")
    assert [event["kind"] for event in read_run(tmp_path / "checkpoints").events].count("resume") == 1
    assert timeless(tmp_path / "checkpoints") == whole
