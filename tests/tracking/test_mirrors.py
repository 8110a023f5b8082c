"""Whole runs with W&B and TensorBoard: what arrives, what must not leave the machine, and what a failing host changes."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from runs import ROOT, TINY, WORDS, metrics, outcome, write_tiny
from wandb_records import history, records
from wandb_server import Answer, Request, wandb_server

KEY = "0123456789abcdef0123456789abcdef01234567"
CANARY = "canary"
WITH_WANDB = TINY + "wandb: {enabled: true}\n"

DRIVER = """
import sys
from smollm2.cli.main import main
sys.exit(main(sys.argv[2:]))  # the first argument is a canary
"""


@dataclass
class WholeRun:
    """A run with W&B as a process of its own, on a machine full of canaries: planted values that must not leave it."""

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

    def prepare(self) -> Path:
        """Make a checkout and a home folder unless they exist, and return the checkout."""
        checkout, home = self.root / "checkout", self.root / "home"
        for path in (home, self.root / "tmp"):
            path.mkdir(parents=True, exist_ok=True)
        if not checkout.exists():
            write_tiny(checkout, text=WORDS * 40 + f"{CANARY}-text. ", config=WITH_WANDB)
            for command in ("init -q", f"remote add origin https://u:{CANARY}-git@example.org/{CANARY}-remote"):
                subprocess.run(["git", *command.split()], check=True, cwd=checkout)
            (checkout / ".env").write_text(f"KEY={CANARY}-dotenv")
            (checkout / "driver.py").write_text(DRIVER + f"# {CANARY}-code")
            (home / ".netrc").write_text(f"machine example.org login me password {CANARY}-netrc\n")
        return checkout

    def start(self) -> None:
        """Start the process, and gather its lines with the seconds since then."""
        checkout, home = self.prepare(), self.root / "home"
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
        """Return the seconds until the first line with this start."""
        return next(when for when, line in self.lines if line.startswith(begins))

    def reported(self) -> list[str]:
        """Return the lines about W&B, except that on the size of the upload."""
        return [line for _, line in self.lines if line.startswith("W&B") and "will be uploaded" not in line]

    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def files(self) -> dict[Path, bytes]:
        """Return every file in the run folder, the home folder and the folder of temporary files."""
        roots = (self.folder, self.root / "home", self.root / "tmp")
        found = [path for root in roots for path in root.rglob("*") if path.is_file() and path.name != ".netrc"]
        return {path: path.read_bytes() for path in found}


def run_whole(root: Path, host: str = "", *flags: str) -> WholeRun:
    whole = WholeRun(root, host, flags)
    whole.start()
    return whole.finish()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """An offline run with every tracker on."""
    done = run_whole(tmp_path_factory.mktemp("whole"), "", "--training.tensorboard", "true")
    assert done.code == 0, done.output()
    return done


def test_nothing_planted_is_in_what_an_offline_run_leaves(whole: WholeRun) -> None:
    """E6, G5: environment, netrc, .env, text, git and argv."""
    files = whole.files()
    assert any(path.suffix == ".wandb" for path in files) and any("tfevents" in path.name for path in files)
    assert [path for path, content in files.items() if CANARY.encode() in content or CANARY in path.name] == []
    assert CANARY not in whole.output()


def test_wandb_has_the_rows_of_the_run_folder(whole: WholeRun) -> None:
    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    mirrored = [row for row in history(records(whole.folder)) if "train/loss" in row or "validation/loss" in row]
    assert len(mirrored) == len(rows) > 12
    for row, mirror in zip(rows, mirrored, strict=True):
        plain = {
            re.sub(r"^(train/|validation/)", "", name): value
            for name, value in mirror.items()
            if not name.startswith("validation/baseline/")
        }
        assert plain == {name.removeprefix("validation_"): value for name, value in row.items()}


def test_trackers_leave_the_run_bit_identical(whole: WholeRun, tmp_path: Path) -> None:
    plain = run_whole(tmp_path, "", "--disable_wandb")
    assert outcome(plain.folder, 12) == outcome(whole.folder, 12)


def test_the_tracking_overhead_is_printed(whole: WholeRun) -> None:
    assert re.search(r"^  logging overhead +\d+\.\d s of \d+ s \(\d+\.\d%\)$", whole.output(), re.MULTILINE)


# Slow: whole runs against a host on loopback, and with a service or a disk that fails


@pytest.mark.slow
def test_nothing_planted_is_in_what_an_online_host_receives(tmp_path: Path) -> None:
    """E6, G5: nor the key, except if the host asks for it. Only wandb's manifests of artifacts name the run folder."""
    with wandb_server() as server:
        done = run_whole(tmp_path, server.url)
        assert done.code == 0, done.output()
        received, bodies = server.received(), b"".join(request.body for request in server.requests)
    assert {"step_0012.pt", "tokenizer.json", "train.py"} <= set(server.uploads())
    assert len([row for row in server.rows() if "train/loss" in row]) == 12
    assert CANARY.encode() not in received
    assert KEY.encode() not in received and base64.b64encode(f"api:{KEY}".encode()) not in bodies
    naming = [r.path for r in server.requests if str(tmp_path).encode() in r.body]
    assert [path for path in naming if not path.startswith("/upload/manifest")] == []
    files = done.files()
    assert [path for path, content in files.items() if CANARY.encode() in content or KEY.encode() in content] == []
    assert CANARY not in done.output() and KEY not in done.output()


def after_the_start(status: int) -> Answer:
    """Answer 200 until the first rows arrive, then `status`."""
    has_begun = threading.Event()

    def answer(request: Request) -> int:
        if request.path.endswith("/file_stream"):
            has_begun.set()
        return status if has_begun.is_set() else 200

    return answer


def slowly(request: Request) -> int:
    time.sleep(1)
    return 200


FAULTS: dict[str, Answer | None] = {
    "refuses": None,
    "hangs": lambda request: 0,
    "401": lambda request: 401,
    "429": lambda request: 429,
    "500": lambda request: 500,
    "is slow": slowly,
    "hangs after the start": after_the_start(0),
    "401 after the start": after_the_start(401),
    "429 after the start": after_the_start(429),
    "500 after the start": after_the_start(500),
}


@pytest.mark.slow
def test_a_failing_host_does_not_stop_the_run(tmp_path: Path) -> None:
    """E1: exit code 0, no row less, the first step within 15 s of a run without W&B, the end within 30 s of it."""
    plain = run_whole(tmp_path / "plain", "", "--disable_wandb")
    first, end = plain.when("step 1/"), plain.seconds - plain.when("Done")
    for name, answer in FAULTS.items():
        with wandb_server() as server:
            server.answer = answer or server.answer
            host = server.url if answer else "http://127.0.0.1:9"
            done = run_whole(tmp_path / name.replace(" ", "_"), host)
        assert done.code == 0, f"{name}: {done.output()}"
        assert metrics(done.folder) == metrics(plain.folder), name
        assert done.when("step 1/") - first < 15, name
        assert done.seconds - done.when("Done") - end < 30, name
        lines = done.reported()
        assert lines and all("Traceback" not in line for _, line in done.lines), name
        if "after" not in name and name != "is slow":
            assert len(lines) == 2 and "offline" in lines[0] and "wandb sync" in lines[1], name


def await_service(whole: WholeRun) -> psutil.Process:
    """Return the wandb-core process of a run, once it has created its file."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert whole.process is not None
        children = psutil.Process(whole.process.pid).children(recursive=True)
        found = [child for child in children if child.name().startswith("wandb-core")]
        if found and any(whole.folder.glob("wandb/*run-*/*.wandb")):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(whole.output())


LONG = ("--train_steps", "600", "--training.eval_interval", "0", "--training.save_interval", "200")


@pytest.mark.slow
def test_a_killed_service_and_a_full_disk_cost_no_row(tmp_path: Path) -> None:
    """E2."""
    whole = WholeRun(tmp_path / "killed", "", LONG)
    whole.start()
    await_service(whole).kill()
    whole.finish()
    assert whole.code == 0 and whole.when("W&B: turned off") < whole.when("Done")
    assert len(whole.reported()) == 2 and whole.reported()[1].endswith(" The run folder is complete.")
    assert [row["step"] for row in metrics(whole.folder) if "loss" in row] == list(range(1, 601))

    full = WholeRun(tmp_path / "full", "", LONG)
    disk = full.prepare() / "checkpoints" / "wandb"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        full.start()
        full.finish()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert full.code == 0, full.output()
    assert [row["step"] for row in metrics(full.folder) if "loss" in row] == list(range(1, 601))


@pytest.mark.slow
def test_two_runs_with_one_id_both_finish(tmp_path: Path) -> None:
    """E2: two resumes from one checkpoint, at once."""
    with wandb_server() as server:
        done = run_whole(tmp_path, server.url, "--train_steps", "4")
        assert done.code == 0, done.output()
        start = str(done.folder / "step_0004.pt")
        both = [
            WholeRun(tmp_path, server.url, ("--checkpoint_path", start, "--save_dir", name)) for name in ("one", "two")
        ]
        for whole in both:
            whole.start()
        for whole in both:
            whole.finish()
        assert [whole.code for whole in both] == [0, 0], both[0].output() + both[1].output()
    for name in ("one", "two"):
        steps = [row["step"] for row in metrics(tmp_path / "checkout" / name) if "loss" in row]
        assert steps == list(range(5, 13))
