"""W&B for real, offline or against a server on loopback that plays one fault; nothing here leaves the machine."""

import contextlib
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smollm2.config import WandbConfig
from smollm2.tracking import wandb as tracker_module
from smollm2.tracking.base import Sample, Tracker
from smollm2.tracking.wandb import (
    DEFAULT_HOST,
    WandbEnvironment,
    decide_mode,
    make_run_id,
    prepare_environment,
    start_wandb,
)

KEY = "a" * 40
ALONE = {"train/step": 1, "train/loss": 2.5}


@pytest.fixture(autouse=True)
def _a_machine_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home, none of the user's variables, and back to the user's own at the end."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name.lower() in ("netrc", "https_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_folder = tmp_path / "a run"
    run_folder.mkdir()
    return run_folder


def start(folder: Path, said: list[str], run_id: str = "run1", **keys: object) -> Tracker | None:
    config = WandbConfig(enabled=True, **keys)  # type: ignore[arg-type]
    return start_wandb(config, {"model": {"width": 64}}, folder, run_id, prepare_environment(os.environ), said.append)


def mirror_one_row(folder: Path, said: list[str], run_id: str = "run1", **keys: object) -> None:
    tracker = start(folder, said, run_id, **keys)
    assert tracker is not None
    tracker.log({"loss": 2.5}, 1)
    tracker.close()


def records(folder: Path) -> list[dict[str, dict[str, object]]]:
    """All records of all offline runs in the folder, by wandb's own reader."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def history(folder: Path) -> list[dict[str, object]]:
    """The logged rows, without wandb's own columns."""
    items = [record["history"]["item"] for record in records(folder) if record["type"] == "history"]
    return [{name: value for name, value in item.items() if not name.startswith("_")} for item in items]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config_mode", "environment", "mode", "reason"),
    [
        ("auto", WandbEnvironment(), "offline", f"no key for {DEFAULT_HOST} was found; `wandb login` stores one"),
        ("online", WandbEnvironment(), "offline", f"no key for {DEFAULT_HOST} was found; `wandb login` stores one"),
        ("online", WandbEnvironment(key_present=True), "online", "wandb.mode"),
        ("offline", WandbEnvironment(key_present=True, mode="online"), "offline", "wandb.mode is offline"),
        ("auto", WandbEnvironment(key_present=True, mode="offline"), "offline", "WANDB_MODE is offline"),
        ("auto", WandbEnvironment(key_present=True, mode="dryrun"), "offline", "WANDB_MODE is dryrun"),
        ("auto", WandbEnvironment(key_present=True, mode="online"), "online", "WANDB_MODE"),
        ("auto", WandbEnvironment(key_present=True, mode="disabled"), "disabled", "WANDB_MODE is disabled"),
        (
            "auto",
            WandbEnvironment(key_present=True, host="http://127.0.0.1:1"),
            "offline",
            "http://127.0.0.1:1 did not answer within 2 s",
        ),
        (
            "auto",
            WandbEnvironment(key_present=True, host="http://[bad"),
            "offline",
            "http://[bad did not answer within 2 s",
        ),
        (
            "auto",
            WandbEnvironment(key_present=True, proxy="127.0.0.1:1"),
            "offline",
            f"{DEFAULT_HOST} did not answer within 2 s",
        ),
    ],
)
def test_online_or_offline_is_decided_by_key_mode_and_host(
    config_mode: str, environment: WandbEnvironment, mode: str, reason: str
) -> None:
    assert decide_mode(WandbConfig(mode=config_mode), environment) == (mode, reason)  # type: ignore[arg-type]


def test_a_host_that_accepts_a_connection_is_online() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert decide_mode(WandbConfig(), WandbEnvironment(key_present=True, host=host))[0] == "online"


NETRC = f"machine api.wandb.ai login user password {KEY}\n"
MY_HOST = "https://wandb.example.org"


@pytest.mark.parametrize(
    ("files", "variables", "environment"),
    [
        ({}, {}, WandbEnvironment()),
        ({}, {"WANDB_API_KEY": KEY}, WandbEnvironment(key_present=True)),
        ({}, {"WANDB_API_KEY": ""}, WandbEnvironment()),
        ({".netrc": NETRC}, {}, WandbEnvironment(key_present=True)),
        ({"_netrc": NETRC}, {}, WandbEnvironment(key_present=True)),
        ({".netrc": NETRC}, {"WANDB_BASE_URL": MY_HOST}, WandbEnvironment(host=MY_HOST)),
        ({".netrc": "machine"}, {}, WandbEnvironment()),
        ({".netrc": "\x00\n"}, {}, WandbEnvironment()),
        ({".config/wandb/settings": f"[default]\napi_key = {KEY}\n"}, {}, WandbEnvironment(key_present=True)),
        ({".config/wandb/settings": f"[default]\nbase_url = {MY_HOST}\n"}, {}, WandbEnvironment(host=MY_HOST)),
        ({".config/wandb/settings": "[default]\nmode = offline\n"}, {}, WandbEnvironment(mode="offline")),
        ({".config/wandb/settings": "mode = offline\n"}, {}, WandbEnvironment()),
        ({}, {"WANDB_MODE": "offline", "HTTPS_PROXY": "proxy:80"}, WandbEnvironment(mode="offline", proxy="proxy:80")),
    ],
)
def test_the_key_the_host_and_the_mode_are_found_where_wandb_finds_them(
    tmp_path: Path, files: dict[str, str], variables: dict[str, str], environment: WandbEnvironment
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert prepare_environment({"HOME": str(tmp_path), **variables}) == environment


def test_wandb_is_told_not_to_report_on_itself_unless_the_user_says_so() -> None:
    silent, asked = {"HOME": "."}, {"HOME": ".", "WANDB_ERROR_REPORTING": "true"}
    prepare_environment(silent)
    prepare_environment(asked)
    assert (silent["WANDB_ERROR_REPORTING"], asked["WANDB_ERROR_REPORTING"]) == ("false", "true")


def test_run_ids_differ_and_move_no_random_state() -> None:
    before = random.getstate()
    assert len({make_run_id() for _ in range(100)}) == 100 and random.getstate() == before


def test_an_offline_run_holds_the_config_the_rows_and_the_samples(folder: Path) -> None:
    said: list[str] = []
    tracker = start(folder, said, tags=("a", "b"), name="first", project="proj")
    assert tracker is not None
    tracker.log({"loss": 2.5, "learning_rate": 1e-4}, 10)
    tracker.log({"validation_loss": 2.0, "validation_bpb": float("inf")}, 10)
    tracker.log_text([Sample("<i>", "x & <script>"), Sample("", "y")], 10)
    tracker.log_event("skip", "not sent", 10)
    tracker.close()

    (run,) = [record["run"] for record in records(folder) if record["type"] == "run"]
    update = run["config"]["update"]  # type: ignore[index]
    assert update["model"] == {"width": 64}
    assert (run["project"], run["display_name"], run["tags"], run["run_id"]) == ("proj", "first", ["a", "b"], "run1")
    rows = history(folder)
    assert rows[0] == {"train/step": 10, "train/loss": 2.5, "train/learning_rate": 1e-4}
    assert rows[1] == {"train/step": 10, "validation/loss": 2, "validation/bpb": "Infinity"}
    assert rows[2]["train/step"] == 10 and rows[2]["samples/text._type"] == "html-file"
    (page,) = folder.glob("wandb/offline-run-*/files/media/html/samples/*.html")
    assert "<b>&lt;i&gt;</b>x &amp; &lt;script&gt;<hr><b></b>y" in page.read_text()
    assert len(said) == 2 and said[1].startswith("W&B: the run is kept offline; upload it with: wandb sync '")
    assert said[1].endswith("-run1'")


def test_a_resume_goes_on_in_the_same_run_and_redone_rows_are_kept(folder: Path) -> None:
    """E4: rows carry a step of their own, so that none is dropped for being behind."""
    mirror_one_row(folder, [])
    mirror_one_row(folder, [], name="again")
    kinds = records(folder)
    assert [record["run"]["run_id"] for record in kinds if record["type"] == "run"] == ["run1", "run1"]
    assert all(record["run"]["resume"] for record in kinds if record["type"] == "run")
    metrics = [record["metric"] for record in kinds if record["type"] == "metric"]
    assert {metric.get("glob_name"): metric.get("step_metric") for metric in metrics}["*"] == "train/step"
    assert history(folder) == [ALONE, ALONE]


MIRROR = """
import os, pathlib, sys
from smollm2.config import WandbConfig
from smollm2.tracking.wandb import prepare_environment, start_wandb
folder = pathlib.Path(sys.argv[1])
tracker = start_wandb(WandbConfig(), {"width": 64}, folder, "run1", prepare_environment(os.environ), print)
tracker.log({"loss": 2.5}, 1)
tracker.close()
"""


def test_nothing_that_was_not_asked_for_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: canaries in the environment, the command line, netrc, .env and git are in no byte of what wandb leaves."""
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("MY_SECRET_TOKEN", "canary-environment")
    for command in ("init -q", "remote add origin https://u:canary-git@example.org/x"):
        subprocess.run(["git", *command.split()], check=True)
    (checkout / ".env").write_text("KEY=canary-dotenv")
    (checkout / "train.py").write_text(MIRROR + "# canary-code")
    (home / ".netrc").write_text("machine example.org login me password canary-netrc\n")
    subprocess.run([sys.executable, "train.py", str(folder), "--password", "canary-argv"], check=True)
    (home / ".netrc").unlink()
    left = [path for root in (folder, home) for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in left)
    assert [path for path in left if b"canary" in path.read_bytes()] == []


def test_no_fact_about_the_machine_is_written(folder: Path) -> None:
    mirror_one_row(folder, [])
    found = records(folder)
    (run,) = [record["run"] for record in found if record["type"] == "run"]
    assert "host" not in run and run["config"]["update"] == {"_wandb": {}, "model": {"width": 64}}  # type: ignore[index]
    assert not any(record["type"] == "environment" for record in found)


def test_a_run_moves_no_random_state(folder: Path) -> None:
    before = random.getstate()
    mirror_one_row(folder, [])
    assert random.getstate() == before


@contextlib.contextmanager
def server_that_says(status: int | None) -> Iterator[str]:
    """A W&B host that answers everything with `status`, or accepts connections and never answers."""
    if status is None:
        with socket.create_server(("127.0.0.1", 0)) as hole:
            yield f"http://127.0.0.1:{hole.getsockname()[1]}"
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("status", "key"), [(None, KEY), (401, KEY), (429, KEY), (500, KEY), (200, "short")])
def test_a_host_that_fails_makes_the_run_offline_in_one_line(
    folder: Path, status: int | None, key: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """E1."""
    monkeypatch.setattr(tracker_module, "INIT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", key)
    said: list[str] = []
    with server_that_says(status) as host:
        monkeypatch.setenv("WANDB_BASE_URL", host)
        mirror_one_row(folder, said)
    assert len(said) == 2 and said[0].startswith("W&B: offline, the host refused: ") and "wandb sync" in said[1]
    assert history(folder) == [ALONE]
    assert capfd.readouterr() == ("", "")


def test_a_host_that_hangs_delays_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server_that_says(None) as host:
        monkeypatch.setenv("WANDB_BASE_URL", host)
        begin = time.monotonic()
        tracker = start(folder, [])
        assert tracker is not None
        tracker.log({"loss": 2.5}, 1)
        assert time.monotonic() - begin < 0.5
        tracker.close()


def test_a_killed_wandb_service_turns_the_mirror_off_in_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """E2."""
    said: list[str] = []
    tracker = start(folder, said)
    assert tracker is not None
    tracker.log({"loss": 2.5}, 1)
    deadline = time.monotonic() + 20
    while not list(folder.glob("wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    services = [child for child in psutil.Process().children() if "wandb" in child.name()]
    assert services
    for service in services:
        service.kill()
        service.wait()
    for step in range(2, 8):
        tracker.log({"loss": 2.5}, step)
    tracker.close()
    assert len(said) == 2 and said[1].startswith("W&B - ") and said[1].endswith("; the run folder has every row")
    assert capfd.readouterr() == ("", "")


def test_a_machine_without_wandb_is_told_so_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E5."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    assert start(folder, said) is None
    assert said == ["W&B - wandb is not installed - training goes on without it; pip install 'smollm2-training[wandb]'"]


def test_a_user_who_disabled_wandb_is_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    assert start(folder, said) is None
    assert said == ["W&B - WANDB_MODE is disabled - training goes on without it"]
    assert list(folder.iterdir()) == []


def test_the_trackers_load_neither_wandb_nor_torch() -> None:
    """E7: what a run without W&B imports."""
    program = (
        "import sys, smollm2.tracking.wandb, smollm2.tracking.jsonl, smollm2.tracking.console\n"
        "print({'torch', 'wandb', 'numpy'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
