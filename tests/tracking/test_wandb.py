"""W&B for real, offline or against a server on loopback that plays one fault; nothing here leaves the machine."""

import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb_records import DIAGNOSIS, history, records, select
from wandb_server import WandbServer, wandb_server

from smollm2.config.schema import Config, WandbConfig
from smollm2.tracking import wandb as tracker_module
from smollm2.tracking.base import Fanout, Landscape, Sample
from smollm2.tracking.charts import BASELINES
from smollm2.tracking.wandb import describe_upload, list_code, start_wandb
from smollm2.tracking.wandb_environment import (
    DEFAULT_HOST,
    WandbEnvironment,
    decide_mode,
    make_run_id,
    prepare_environment,
)
from smollm2.tracking.wandb_links import CheckpointLinks

KEY = "a" * 40
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
ALONE = {"train/step": 1, "train/loss": 2.5}


def empty_machine(home: Path, patch: pytest.MonkeyPatch) -> None:
    """An empty home and none of the user's variables, until `patch` is undone."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name.lower() in ("netrc", "https_proxy"):
            patch.delenv(name)
    home.mkdir()
    patch.setenv("HOME", str(home))
    for name in ("WANDB_ERROR_REPORTING", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # which prepare_environment sets
        patch.setenv(name, "")
        patch.delenv(name)


@pytest.fixture(autouse=True)
def _a_machine_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_machine(tmp_path / "home", monkeypatch)


def make_run_folder(parent: Path) -> Path:
    """What a run has written before its trackers open."""
    folder = parent / "a run"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run_folder(tmp_path)


def start(folder: Path, reported: list[str], run_id: str = "run1", **keys: object) -> Fanout | None:
    section = WandbConfig(**{"enabled": True, "log_checkpoints": "none", "log_code": False, **keys})  # type: ignore[arg-type]
    tracker = start_wandb(
        Config(wandb=section), folder, run_id, prepare_environment(os.environ, folder), reported.append
    )
    return Fanout([tracker]) if tracker else None


def mirror_one_row(folder: Path, reported: list[str], run_id: str = "run1", **keys: object) -> None:
    tracker = start(folder, reported, run_id, **keys)
    assert tracker is not None
    tracker.log({"loss": 2.5}, 1)
    tracker.close()


@pytest.mark.parametrize(
    ("config_mode", "environment", "mode", "reason"),
    [
        ("auto", WandbEnvironment(), "offline", f"no key for {DEFAULT_HOST} (`wandb login` stores one)"),
        ("online", WandbEnvironment(), "offline", f"no key for {DEFAULT_HOST} (`wandb login` stores one)"),
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
def test_key_host_and_mode_are_found_in_the_same_places_as_by_wandb(
    tmp_path: Path, files: dict[str, str], variables: dict[str, str], environment: WandbEnvironment
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert prepare_environment({"HOME": str(tmp_path), **variables}, tmp_path) == environment


def test_wandb_does_not_send_error_reports_unless_the_user_asks() -> None:
    silent, asked = {"HOME": "."}, {"HOME": ".", "WANDB_ERROR_REPORTING": "true"}
    prepare_environment(silent, Path())
    prepare_environment(asked, Path())
    assert (silent["WANDB_ERROR_REPORTING"], asked["WANDB_ERROR_REPORTING"]) == ("false", "true")


def test_run_ids_differ_and_change_no_random_state() -> None:
    before = random.getstate()
    assert len({make_run_id() for _ in range(100)}) == 100 and random.getstate() == before


LANDSCAPE = Landscape(2.0, (-1, 0, 1), (3.0, 2.0, math.inf), (-1, 1), ((4.0, 5.0), (6.0, 7.0)), seed=0, targets=8)
CHECKPOINT = bytes(range(256)) * 4096


def send_everything(tracker: Fanout, folder: Path) -> None:
    """Send each kind of message once or twice."""
    tracker.log({"loss": 2.5, "learning_rate": 1e-4}, 10)
    tracker.log({"validation_loss": 2.0, "validation_bpb": math.inf}, 10)
    tracker.log_event("baselines", "", 10, losses={name: float(n) for n, name in enumerate(BASELINES)}, counted=7)
    tracker.log({"loss": 3.5, "learning_rate": 2e-4}, 20)
    tracker.log({"validation_loss": 2.25, "validation_bpb": 1.5}, 20)
    tracker.log_text([Sample("<i>", "x & <script>"), Sample("", "y\ud800")], 10)
    tracker.log_text([Sample("<i>", "z")], 20)
    tracker.log_event("skip", "not sent", 10)
    tracker.log_diagnosis(DIAGNOSIS, 20)
    tracker.log_landscape(LANDSCAPE, 20)
    for step in (10, 20):
        (folder / f"step_{step:04d}.pt").write_bytes(CHECKPOINT + bytes([step]))
        tracker.save_file(folder / f"step_{step:04d}.pt", step, is_best=step == 10)
    tracker.close()


@dataclass(frozen=True)
class Record:
    """A run that sent everything: its folder, the home folder, the reported lines and the records of the .wandb file."""

    folder: Path
    home: Path
    reported: list[str]
    found: list[dict[str, Any]]

    def media(self, kind: str) -> list[Any]:
        """The files of one kind, in the order in which they were written."""
        paths = self.folder.glob(f"wandb/offline-run-*/files/media/{kind}/**/*.json")
        return [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]

    def artifact(self, name: str) -> list[dict[str, Any]]:
        return [artifact for artifact in select(self.found, "artifact") if artifact["name"] == name]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Record:
    root, reported = tmp_path_factory.mktemp("offline"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        empty_machine(root / "home", patch)
        folder = make_run_folder(root)
        keys: dict[str, Any] = {
            "tags": ("a", "b"),
            "name": "first",
            "project": "proj",
            "log_checkpoints": "all",
            "log_code": True,
        }
        tracker = start(folder, reported, **keys)
        assert tracker is not None
        send_everything(tracker, folder)
        return Record(folder, root / "home", reported, records(folder))


def test_offline_the_upload_command_is_reported_at_the_end(offline: Record) -> None:
    assert offline.reported[0] == f"W&B: offline, no key for {DEFAULT_HOST} (`wandb login` stores one)"
    assert re.fullmatch(r"W&B: 10 checkpoints of 1\.\d+ GB = 1\d\.\d GB will be uploaded\. .*", offline.reported[1])
    assert offline.reported[2].startswith("W&B: the run was recorded offline. Upload it with: wandb sync '")
    assert offline.reported[2].endswith("-run1'") and len(offline.reported) == 3


def test_config_name_and_tags_are_those_of_the_run(offline: Record) -> None:
    (run,) = select(offline.found, "run")
    config = run["config"]["update"]
    assert config["training"]["learning_rate"] == 1e-4 and config["wandb"]["project"] == "proj"
    assert (run["project"], run["display_name"], run["tags"], run["run_id"]) == ("proj", "first", ["a", "b"], "run1")


def test_the_name_of_the_run_is_that_of_its_folder_by_default(other: Record) -> None:
    (run,) = select(other.found, "run")
    assert run["display_name"] == "a run"


def test_metrics_are_in_groups_against_our_own_step(offline: Record) -> None:
    baselines = {f"validation/baseline/{name}": n for n, name in enumerate(BASELINES)}
    assert history(offline.found)[:4] == [
        {"train/step": 10, "train/loss": 2.5, "train/learning_rate": 1e-4},
        {"train/step": 10, "validation/loss": 2, "validation/bpb": "Infinity"},
        {"train/step": 20, "train/loss": 3.5, "train/learning_rate": 2e-4},
        {"train/step": 20, "validation/loss": 2.25, "validation/bpb": 1.5, **baselines},
    ]
    metrics = select(offline.found, "metric")
    assert {metric.get("glob_name"): metric.get("step_metric") for metric in metrics}["*"] == "train/step"


def test_the_rate_is_a_curve_of_its_own(offline: Record) -> None:
    rows = [row for row in history(offline.found) if "train/learning_rate" in row]
    assert [(row["train/step"], row["train/learning_rate"]) for row in rows] == [(10, 1e-4), (20, 2e-4)]


def test_the_summary_has_the_best_values(offline: Record) -> None:
    summary: dict[str, Any] = {}
    for record in select(offline.found, "summary"):
        summary |= record["update"]
    assert summary["validation/loss"] == {"min": 2} and summary["validation/bpb"] == {"min": 1.5}
    assert summary["train/loss"] == {"min": 2.5} and summary["train/learning_rate"] == 2e-4


def test_samples_are_a_table_that_grows(offline: Record) -> None:
    rounds = offline.media("table")
    assert [round["columns"] for round in rounds] == [["step", "prompt", "text"]] * 2
    assert [row for round in rounds for row in round["data"]] == [
        [10, "<i>", "x & <script>"],
        [10, "", "y\ud800"],
        [20, "<i>", "z"],
    ]
    rows = [row for row in history(offline.found) if "samples/table.nrows" in row]
    assert [(row["train/step"], row["samples/table.nrows"]) for row in rows] == [(10, 2), (20, 3)]
    assert len(offline.artifact(select(offline.found, "artifact")[3]["name"])) == 2


def test_gradients_and_parameters_are_histograms(offline: Record) -> None:
    (row,) = [row for row in history(offline.found) if "gradients/clipped" in row]
    assert row["train/step"] == 20
    for group, counts, edges in (("gradients", [3, 1], [-1, 0, 2]), ("parameters", [5, 6], [0, 0.5, 1])):
        name = f"{group}/histogram/model.norm.weight"
        assert (row[f"{name}._type"], row[f"{name}.values"], row[f"{name}.bins"]) == ("histogram", counts, edges)


def test_diagnostics_are_logged_by_layer_and_block(offline: Record) -> None:
    (row,) = [row for row in history(offline.found) if "gradients/clipped" in row]
    expected = {
        "gradients/clipped": 0.75,
        "gradients/norm/embed_tokens": 1,
        "gradients/norm/layers.0": 5,
        "gradients/norm/norm": 0.5,
        "parameters/norm/layers.0": 10,
        "parameters/update_ratio/layers.0": 0.3,
        "activations/rms/layers.0": 1.5,
        "activations/dead_units/layers.0": 0.25,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_the_flow_of_gradients_is_a_chart_over_the_layers(offline: Record) -> None:
    flow = offline.media("plotly")[0]
    layers = ["embed_tokens", "layers.0", "norm"]
    assert [(curve["name"], curve["x"]) for curve in flow["data"]] == [
        ("gradient norm", layers),
        ("weight norm", layers),
        ("update / weight", layers),
    ]
    assert flow["data"][0]["y"] == [1, 5, 0.5] and flow["layout"]["yaxis"]["type"] == "log"


def test_the_landscape_is_a_surface_and_a_line(offline: Record) -> None:
    figures = {figure["data"][0]["type"]: figure["data"][0] for figure in offline.media("plotly")[1:]}
    assert figures["surface"]["z"] == [[4, 6], [5, 7]] and figures["surface"]["y"] == [-1, 1]
    assert figures["scatter"]["y"] == [3, 2, None] and figures["scatter"]["x"] == [-1, 0, 1]
    assert any(row.get("landscape/loss") == 2 and row["train/step"] == 20 for row in history(offline.found))


def test_of_the_machine_only_the_load_is_sent(offline: Record) -> None:
    measured = {name for record in select(offline.found, "stats") for name in record["item"]}
    assert "memory_percent" in measured
    families = ("cpu", "memory", "disk.", "network.", "proc.", "gpu", "system.")
    assert [name for name in measured if not name.startswith(families)] == []
    assert not any(record["type"] == "environment" for record in offline.found)
    assert "host" not in select(offline.found, "run")[0]


def test_config_tokenizer_and_code_are_artifacts(offline: Record) -> None:
    for name, text in (("config.yaml", b"model: {}\n"), ("tokenizer.json", b"{}")):
        (artifact,) = offline.artifact(name.partition(".")[0])
        (entry,) = artifact["manifest"]["contents"]
        assert entry["path"] == name and Path(entry["local_path"]).read_bytes() == text
    (code,) = offline.artifact("code")
    assert {entry["path"] for entry in code["manifest"]["contents"]} == {name for _, name in list_code()}


def test_code_is_this_package_and_train_py_and_nothing_else() -> None:
    names = [name for _, name in list_code()]
    assert {"train.py", "smollm2/training/loop.py", "smollm2/tracking/wandb.py"} <= set(names)
    assert all(re.fullmatch(r"train\.py|smollm2/(\w+/)?\w+\.py", name) for name in names)


def test_checkpoints_are_versions_of_one_artifact_and_are_not_copied(offline: Record) -> None:
    found = offline.artifact("checkpoints-run1")
    assert [sorted(artifact["aliases"]) for artifact in found] == [
        ["best", "latest", "step_0010"],
        ["latest", "step_0020"],
    ]
    entries = [entry for artifact in found for entry in artifact["manifest"]["contents"]]
    assert [entry["local_path"] for entry in entries] == [str(offline.folder / f"step_00{n}0.pt") for n in (1, 2)]
    assert [
        path for path in (offline.folder / "wandb").rglob("*") if path.is_file() and path.stat().st_size > 2**20
    ] == []


def test_nothing_is_written_to_the_home_folder(offline: Record, online: tuple[WandbServer, Record]) -> None:
    assert [*offline.home.iterdir(), *online[1].home.iterdir()] == []


# Online


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WandbServer, Record]]:
    root, reported = tmp_path_factory.mktemp("online"), list[str]()
    with pytest.MonkeyPatch.context() as patch, wandb_server() as server:
        empty_machine(root / "home", patch)
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_BASE_URL", server.url)
        folder = make_run_folder(root)
        tracker = start(folder, reported, log_checkpoints="all", log_code=True)
        assert tracker is not None
        send_everything(tracker, folder)
        yield server, Record(folder, root / "home", reported, [])


def test_online_the_rows_and_the_files_arrive(online: tuple[WandbServer, Record]) -> None:
    server, record = online
    assert reported_but_the_upload(record.reported) == [f"W&B: {server.url}/me/smollm2/runs/run1"]
    assert server.rows()[0] == {"train/step": 10, "train/loss": 2.5, "train/learning_rate": 1e-4}
    uploads = server.uploads()
    assert uploads["step_0010.pt"] == CHECKPOINT + b"\x0a" and uploads["step_0020.pt"] == CHECKPOINT + b"\x14"
    assert {"config.yaml", "tokenizer.json", "train.py", "smollm2/model/transformer.py"} <= set(uploads)
    created = [(artifact["artifactCollectionName"], artifact["artifactTypeName"]) for artifact in server.artifacts]
    assert {("checkpoints-run1", "model"), ("code", "code"), ("config", "config"), ("tokenizer", "tokenizer")} <= set(
        created
    )


def test_online_the_hard_links_of_checkpoints_are_removed_at_the_end(online: tuple[WandbServer, Record]) -> None:
    folder = online[1].folder
    assert [path.name for path in sorted(folder.rglob("*.pt"))] == ["step_0010.pt", "step_0020.pt"]
    assert all(path.stat().st_nlink == 1 for path in folder.glob("*.pt"))


def test_online_a_resume_continues_the_same_run_and_its_table(
    online: tuple[WandbServer, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4."""
    server, record = online
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    before = len(server.rows())
    tracker = start(record.folder, [])
    assert tracker is not None
    tracker.log({"loss": 1.5}, 11)  # behind the last row
    tracker.log_text([Sample("<i>", "again")], 12)
    tracker.close()
    redone, samples = server.rows()[before:]
    assert redone == {"train/step": 11, "train/loss": 1.5}
    assert (samples["train/step"], samples["samples/table"]["increment_num"]) == (12, 2)


def reported_but_the_upload(reported: list[str]) -> list[str]:
    return [line for line in reported if "will be uploaded" not in line]


def test_a_checkpoint_that_is_removed_during_its_upload_arrives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    with wandb_server() as server:
        go_on, path = threading.Event(), folder / "step_0010.pt"

        def answer(request: object) -> int:
            if getattr(request, "operation", "") == "CreateArtifactFiles":
                go_on.wait(20)
            return 200

        server.answer = answer
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = start(folder, reported, log_checkpoints="all")
        assert tracker is not None
        path.write_bytes(CHECKPOINT)
        tracker.save_file(path, 10, is_best=False)
        path.unlink()
        go_on.set()
        tracker.close()
        assert server.uploads()["step_0010.pt"] == CHECKPOINT
    assert list(folder.rglob("*.pt")) == [] and len(reported_but_the_upload(reported)) == 1


@pytest.mark.parametrize(("chosen", "kept"), [("none", []), ("best", [10]), ("all", [10, 20])])
def test_which_checkpoints_are_uploaded(folder: Path, chosen: str, kept: list[int]) -> None:
    links = CheckpointLinks(folder, WandbConfig(log_checkpoints=chosen), print)  # type: ignore[arg-type]
    for step in (10, 20):
        (folder / f"step_{step:04d}.pt").write_bytes(CHECKPOINT)
    found = [step for step in (10, 20) if links.keep(folder / f"step_{step:04d}.pt", step == 10)]
    assert found == kept


def test_hard_links_of_a_killed_run_are_removed_by_the_next(folder: Path) -> None:
    (folder / "step_0010.pt").write_bytes(CHECKPOINT)
    CheckpointLinks(folder, WandbConfig(), print).keep(folder / "step_0010.pt", False)
    assert len(list(folder.rglob("*.pt"))) == 2
    tracker = start(folder, [])
    assert tracker is not None and len(list(folder.rglob("*.pt"))) == 1
    tracker.close()


def test_checkpoints_that_cannot_be_linked_are_skipped_and_reported_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    reported: list[str] = []
    tracker = start(folder, reported, log_checkpoints="all")
    assert tracker is not None
    send_everything(tracker, folder)
    assert [line for line in reported if "linked" in line] == [
        "W&B: step_0010.pt cannot be linked (Operation not permitted). No checkpoints are uploaded."
    ]


@pytest.mark.parametrize(
    ("keys", "done", "line"),
    [
        ({"save_interval": 500}, 0, "10 checkpoints of 1.76 MB = 17.6 MB"),
        ({"save_interval": 600}, 0, "9 checkpoints of 1.76 MB = 15.8 MB"),
        ({"save_interval": 500}, 4000, "2 checkpoints of 1.76 MB = 3.52 MB"),
        ({"save_interval": 0}, 0, "1 checkpoints of 1.76 MB = 1.76 MB"),
        ({"save_interval": 500, "keep_last": 2}, 0, "10 checkpoints of 1.76 MB = 17.6 MB"),
    ],
)
def test_the_size_of_the_upload_is_reported_at_the_start(keys: dict[str, int], done: int, line: str) -> None:
    config = Config.model_validate({"model": SMALL, "training": {"train_steps": 5000, **keys}})
    assert describe_upload(config, done) == f"{line} will be uploaded. To upload none: --wandb.log_checkpoints none."


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """An offline run with other keys: it thins out, sends no gradients, and its tables are short."""
    root, reported = tmp_path_factory.mktemp("other"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        empty_machine(root / "home", patch)
        patch.setattr(tracker_module, "TABLE_ROWS", 2)
        folder = make_run_folder(root)
        keys = {"training": {"keep_last": 2}, "wandb": {"log_code": False, "log_gradients": False}}
        environment = prepare_environment(os.environ, folder)
        tracker = start_wandb(Config.model_validate(keys), folder, "run1", environment, reported.append)
        assert tracker is not None
        send_everything(Fanout([tracker]), folder)
        return Record(folder, root / "home", reported, records(folder))


def test_an_offline_run_with_keep_last_reports_that_no_checkpoint_is_uploaded(other: Record) -> None:
    assert [line for line in other.reported if "keep_last" in line] == [
        "W&B: the run is offline and training.keep_last removes checkpoints, so wandb sync will upload none"
    ]
    assert all(path.stat().st_nlink == 1 for path in other.folder.rglob("*.pt"))
    assert other.artifact("checkpoints-run1") == []


def test_a_long_table_is_followed_by_a_new_one(other: Record) -> None:
    rows = [row["samples/table.nrows"] for row in history(other.found) if "samples/table.nrows" in row]
    assert rows == [2, 1]


def test_gradients_and_code_are_not_sent_if_they_are_turned_off(other: Record) -> None:
    assert not any("gradients" in name for row in history(other.found) for name in row)
    assert other.artifact("code") == []


def test_a_resume_continues_the_same_run_and_redone_rows_are_kept(folder: Path) -> None:
    """E4: rows carry a step of their own, so that none is dropped for being behind."""
    mirror_one_row(folder, [])
    mirror_one_row(folder, [], name="again")
    found = records(folder)
    assert [(run["run_id"], run["resume"]) for run in select(found, "run")] == [("run1", True)] * 2
    assert history(found) == [ALONE, ALONE]


def test_a_run_changes_no_random_state(folder: Path) -> None:
    before = random.getstate()
    mirror_one_row(folder, [])
    assert random.getstate() == before


@pytest.mark.parametrize(("status", "key"), [(0, KEY), (401, KEY), (200, "short")])
def test_a_host_that_fails_makes_the_run_offline_in_one_line(
    folder: Path, status: int, key: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """E1."""
    monkeypatch.setattr(tracker_module, "INIT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", key)
    reported: list[str] = []
    with wandb_server() as server:
        server.answer = lambda request: status
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        mirror_one_row(folder, reported)
    assert (
        len(reported) == 2
        and reported[0].startswith("W&B: offline, the host refused (")
        and "wandb sync" in reported[1]
    )
    assert history(records(folder)) == [ALONE]
    assert capfd.readouterr() == ("", "")


def test_a_host_that_hangs_delays_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as server:
        server.answer = lambda request: 0
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        begin = time.monotonic()
        tracker = start(folder, [])
        assert tracker is not None
        tracker.log({"loss": 2.5}, 1)
        assert time.monotonic() - begin < 0.5
        tracker.close()


def test_a_killed_wandb_service_turns_the_tracker_off_in_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """E2."""
    reported: list[str] = []
    tracker = start(folder, reported)
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
    ends = [line for line in reported if line.startswith("W&B: turned off")]  # an upload under way is reported too
    assert ends == reported[-1:] and ends[0].endswith(" The run folder is complete.")
    assert capfd.readouterr() == ("", "")


def test_a_machine_without_wandb_is_reported_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E5."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    reported: list[str] = []
    assert start(folder, reported) is None
    assert reported == [
        "W&B: wandb is not installed, the run continues without it. Run pip install 'smollm2-training[wandb]'."
    ]


def test_wandb_mode_disabled_turns_the_tracker_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    reported: list[str] = []
    assert start(folder, reported) is None
    assert reported == ["W&B: WANDB_MODE is disabled, the run continues without it"]
    assert not (folder / "wandb").exists()


def test_the_trackers_load_neither_wandb_nor_torch() -> None:
    """E7: what a run without W&B imports."""
    program = (
        "import sys, smollm2.tracking.wandb, smollm2.tracking.jsonl, smollm2.tracking.console\n"
        "print({'torch', 'wandb', 'numpy'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
