"""Pages of the report for tests: built, parsed as by a browser, and of run folders with hostile text or many rows."""

import json
import random
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from run_folders import write_data, write_run

from smollm2.report.page import page_chunks
from smollm2.report.reading import RunFolder, read_runs
from smollm2.tracking.base import Fanout, Sample
from smollm2.tracking.jsonl import JsonlTracker

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
    write_data(run, text, text)
    *_, last = (run / "diagnostics.jsonl").read_text().splitlines()
    diagnostics = json.loads(last)
    for part in ("gradient_norms", "weight_norms", "update_ratios"):
        diagnostics[part][text] = 1.0
    diagnostics["activations"][text] = {"rms": 1.0}
    with (run / "diagnostics.jsonl").open("a") as file:
        file.write(json.dumps(diagnostics) + "\n")


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
