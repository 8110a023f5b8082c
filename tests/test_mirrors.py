"""Whole runs that are mirrored: what arrives, what must not leave, and what a run does when the mirror breaks."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from runs import ROOT, TINY, WORDS, outcome, write_tiny
from test_tracking_wandb import history, records

KEY = "0123456789abcdef0123456789abcdef01234567"
CANARY = "canary"
MIRRORED = TINY + "wandb: {enabled: true}\n"

DRIVER = """
import sys
from smollm2.cli import main
sys.exit(main(sys.argv[2:]))  # the first argument is for nobody
"""


@dataclass
class WholeRun:
    """A mirrored run as a process of its own, on a machine full of canaries."""

    root: Path
    host: str = ""
    flags: tuple[str, ...] = ()
    lines: list[tuple[float, str]] = field(default_factory=list)
    code: int = -1
    seconds: float = 0.0
    process: "subprocess.Popen[str] | None" = None

    @property
    def folder(self) -> Path:
        return self.root / "checkout" / "checkpoints"

    def start(self) -> None:
        """Begin, and gather its lines with the seconds since then."""
        checkout, home = self.root / "checkout", self.root / "home"
        for path in (home, self.root / "tmp"):
            path.mkdir(parents=True, exist_ok=True)
        if not checkout.exists():
            write_tiny(checkout, text=WORDS * 40 + f"{CANARY}-text. ", config=MIRRORED)
            for command in ("init -q", f"remote add origin https://u:{CANARY}-git@example.org/{CANARY}-remote"):
                subprocess.run(["git", *command.split()], check=True, cwd=checkout)
            (checkout / ".env").write_text(f"KEY={CANARY}-dotenv")
            (checkout / "driver.py").write_text(DRIVER + f"# {CANARY}-code")
        (home / ".netrc").write_text(f"machine example.org login me password {CANARY}-netrc\n")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {"HOME": str(home), "TMPDIR": str(self.root / "tmp"), "PYTHONPATH": str(ROOT)}
        environment |= {"MY_SECRET_TOKEN": f"{CANARY}-environment", f"{CANARY}_NAME": "x", "OMP_NUM_THREADS": "1"}
        environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": self.host} if self.host else {}
        command = [sys.executable, "driver.py", f"--password={CANARY}-argv", "train", *self.flags]
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

        def gather() -> None:
            assert self.process is not None and self.process.stdout is not None
            self.lines += [(time.monotonic() - began, line.rstrip("\n")) for line in self.process.stdout]
            self.code = self.process.wait()
            self.seconds = time.monotonic() - began

        self.thread = threading.Thread(target=gather)
        self.thread.start()

    def finish(self) -> "WholeRun":
        self.thread.join()
        return self

    def when(self, begins: str) -> float:
        """Seconds until the first line that begins so."""
        return next(when for when, line in self.lines if line.startswith(begins))

    def said(self) -> list[str]:
        """The lines about W&B, that on the size of the upload apart."""
        return [line for _, line in self.lines if line.startswith("W&B") and "will be uploaded" not in line]

    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def left(self) -> dict[Path, bytes]:
        """All that it left in the run folder, the home folder and the folder of temporary files."""
        roots = (self.folder, self.root / "home", self.root / "tmp")
        found = [path for root in roots for path in root.rglob("*") if path.is_file() and path.name != ".netrc"]
        return {path: path.read_bytes() for path in found}


def run_whole(root: Path, host: str = "", *flags: str) -> WholeRun:
    whole = WholeRun(root, host, flags)
    whole.start()
    return whole.finish()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """An offline run with every mirror on."""
    done = run_whole(tmp_path_factory.mktemp("whole"), "", "--training.tensorboard", "true")
    assert done.code == 0, done.output()
    return done


def test_no_canary_is_in_what_an_offline_run_leaves(whole: WholeRun) -> None:
    """E6, G5: environment, netrc, .env, text, git and argv."""
    left = whole.left()
    assert any(path.suffix == ".wandb" for path in left) and any("tfevents" in path.name for path in left)
    assert [path for path, content in left.items() if CANARY.encode() in content or CANARY in path.name] == []
    assert CANARY not in whole.output()


def test_the_mirror_has_the_rows_of_the_run_folder(whole: WholeRun) -> None:
    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    mirrored = [row for row in history(records(whole.folder)) if "train/loss" in row or "validation/loss" in row]
    assert len(mirrored) == len(rows) > 12
    for row, mirror in zip(rows, mirrored, strict=True):
        plain = {re.sub(r"^(train/|validation/)", "", name): value for name, value in mirror.items()}
        assert plain == {name.removeprefix("validation_"): value for name, value in row.items()}


def test_mirrors_change_no_bit_of_the_run(whole: WholeRun, tmp_path: Path) -> None:
    plain = run_whole(tmp_path, "", "--disable_wandb")
    assert outcome(plain.folder, 12) == outcome(whole.folder, 12)


def test_the_seconds_spent_on_watching_are_printed(whole: WholeRun) -> None:
    assert re.search(r"^  watching +\d+\.\d s of \d+ s \(\d+\.\d%\)$", whole.output(), re.MULTILINE)
