"""The mirror in Weights & Biases: the only importer of wandb, and only inside a function.

Online or offline is decided before `init`, since that blocks for a minute and more where the host is dead. Everything of
wandb, its import too, runs on the fence's thread: training starts at once. What wandb would send unasked (git remote and
diff, package list, host, program, argv, stdout, code) is turned off; of the machine it sends how busy it is and no more.
Rows carry their own step, `train/step`: wandb's `step=` drops the rows that a resume writes again.

Nothing is written to the home folder: what wandb copies before it uploads lies in the run's own wandb folder, and a
checkpoint is not copied at all. While it uploads it has a second name there, so that thinning out the run folder may
remove the first; offline it is uploaded from where it lies.
"""

import configparser
import contextlib
import importlib.util
import math
import netrc
import os
import secrets
import shlex
import signal
import socket
import string
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from smollm2.config.schema import Config, WandbConfig
from smollm2.formatting import format_bytes
from smollm2.plan import arithmetic as plan
from smollm2.tracking.base import Diagnosis, Fence, Landscape, Sample, Say, Tracker, describe
from smollm2.tracking.charts import diagnosis_metrics, finite, flow_by_layer, group_metrics

if TYPE_CHECKING:
    import wandb

DEFAULT_HOST = "https://api.wandb.ai"
PROBE_SECONDS = 2.0
INIT_SECONDS = 10.0
FINISH_SECONDS = 15.0
CLOSE_SECONDS = 21.0
"""For what waits in the queue and the finish together; with LEAVE_SECONDS the end of a run is held up for less than 30."""

LEAVE_SECONDS = 3.0
"""After that its service is killed: at the end of Python wandb waits for it, and for as long as a host hangs."""

TABLE_ROWS = 1000
"""Samples in one table: each round that it grows by names all rounds before it."""

BEST = {"validation/loss": "min", "validation/bpb": "min", "train/loss": "min", "train/tokens_per_second": "max"}
"""What the summary of a run shows of its metrics; of the others the last."""

OWN_FOLDER = Path("wandb", "smollm2")
OWN_FOLDERS = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
"""Variables that name where wandb puts copies and logs, in the home folder by default; and where they go instead."""

Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbEnvironment:
    """What the machine says about W&B; `prepare_environment` fills it in."""

    key_present: bool = False
    mode: str | None = None
    host: str = DEFAULT_HOST
    proxy: str | None = None


def prepare_environment(variables: MutableMapping[str, str], folder: Path) -> WandbEnvironment:
    """Read the variables of this process (`os.environ`) and the files in which `wandb login` leaves host and key.

    Sets, where the user has not, what wandb 0.31 has no other switch for: WANDB_ERROR_REPORTING=false, the telemetry that
    it sends about itself, which also held back the end of the process for 20 s where the host hangs (measured 2026-11);
    and the places of its copies and logs, which become folders of the run `folder`.
    """
    variables.setdefault("WANDB_ERROR_REPORTING", "false")
    for name, place in OWN_FOLDERS.items():
        ending = str(OWN_FOLDER / place)
        if variables.get(name, ending).endswith(ending):  # or from an earlier run of this process
            variables[name] = str(folder.absolute() / ending)
    home = Path(variables.get("HOME") or Path.home())
    settings = read_settings(Path(variables.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings")
    host = variables.get("WANDB_BASE_URL") or settings.get("base_url") or DEFAULT_HOST
    in_netrc = [Path(variables["NETRC"])] if variables.get("NETRC") else [home / ".netrc", home / "_netrc"]
    return WandbEnvironment(
        key_present=bool(
            variables.get("WANDB_API_KEY")
            or variables.get("WANDB_IDENTITY_TOKEN_FILE")
            or settings.get("api_key")
            or any(holds_key(path, host) for path in in_netrc)
        ),
        mode=variables.get("WANDB_MODE") or settings.get("mode"),
        host=host,
        proxy=variables.get("HTTPS_PROXY") or variables.get("https_proxy"),
    )


def read_settings(path: Path) -> dict[str, str]:
    """wandb's own settings file; empty where it is absent or damaged."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
        return dict(parser["default"])
    except (OSError, ValueError, KeyError, configparser.Error):
        return {}


def holds_key(path: Path, host: str) -> bool:
    """Whether a netrc file has a password for the host."""
    try:
        found = netrc.netrc(str(path)).authenticators(urlsplit(host).netloc)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])


def make_run_id() -> str:
    """Eight characters, as wandb's own ids; from the system, so that no random state moves."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def start_wandb(
    config: Config, folder: Path, run_id: str, environment: WandbEnvironment, say: Say, done: int = 0
) -> Tracker | None:
    """A tracker that mirrors the run, or None with one line that says why not. Takes two seconds at most.

    `run_id` makes a resume go on in the same W&B run; `done` is how many updates are behind it.
    """
    if importlib.util.find_spec("wandb") is None:
        say("W&B - wandb is not installed - training goes on without it; pip install 'smollm2-training[wandb]'")
        return None
    mode, reason = decide_mode(config.wandb, environment)
    if mode == "disabled":
        say(f"W&B - {reason} - training goes on without it")
        return None
    if mode == "offline":
        say(f"W&B: offline, {reason}")
    if config.wandb.log_checkpoints != "none" and (mode == "online" or config.training.keep_last is None):
        say(f"W&B: {describe_upload(config, done)}")
    remove_links(folder)
    links = CheckpointLinks(folder, config.wandb, say)
    return Fence(
        "W&B",
        lambda: open_run(config, folder, run_id, mode, say),
        say,
        keep_file=links.keep,
        leave=lambda: threading.Thread(target=end_service, name="W&B end", daemon=True).start(),
        close_seconds=CLOSE_SECONDS,
    )


def end_service() -> None:
    """Kill the service of this process, after a grace. Where there is no /proc, it ends when wandb lets it."""
    time.sleep(LEAVE_SECONDS)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


def describe_upload(config: Config, done: int) -> str:
    """How much the checkpoints of the rest of the run are."""
    t, size = config.training, plan.make_plan(config, "cpu-float32", 1).checkpoint_bytes
    count = math.ceil(t.train_steps / t.save_interval) - done // t.save_interval if t.save_interval else 1
    kind, most = ("checkpoints", "") if config.wandb.log_checkpoints == "all" else ("best checkpoints", "at most ")
    return (
        f"{most}{count} {kind} of {format_bytes(size)} = {format_bytes(size * count)} will be uploaded; "
        "wandb.log_checkpoints none sends none"
    )


def links_folder(folder: Path) -> Path:
    """Where the second names of checkpoints lie."""
    return folder.absolute() / OWN_FOLDER / "checkpoints"


def remove_links(folder: Path) -> None:
    """All of a run folder. What a run that was cut short left there may hold gigabytes of checkpoints thinned out since."""
    for path in links_folder(folder).glob("*.pt"):
        with contextlib.suppress(OSError):
            path.unlink()


class CheckpointLinks:
    """Second names of checkpoints that are to be uploaded, in the run's wandb folder, on the same disk."""

    def __init__(self, folder: Path, config: WandbConfig, say: Say) -> None:
        self.folder, self.chosen, self.say = links_folder(folder), config.log_checkpoints, say

    def keep(self, path: Path, is_best: bool) -> Path | None:
        """The second name, or None where this one is not wanted; or where the disk knows no such names, and it is said."""
        if self.chosen == "none" or (self.chosen == "best" and not is_best):
            return None
        link = self.folder / path.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.hardlink_to(path)
        except OSError as error:
            self.chosen = "none"
            self.say(f"W&B - {path.name} cannot be linked: {error.strerror or error} - no checkpoints are uploaded")
            return None
        return link


def decide_mode(config: WandbConfig, environment: WandbEnvironment) -> tuple[Mode, str]:
    """`online`, `offline` or `disabled`, and the reason. The config's mode outranks the environment's."""
    asked, by = (environment.mode or "auto", "WANDB_MODE") if config.mode == "auto" else (config.mode, "wandb.mode")
    if asked == "disabled":
        return "disabled", f"{by} is disabled"
    if asked in ("offline", "dryrun"):
        return "offline", f"{by} is {asked}"
    if not environment.key_present:
        return "offline", f"no key for {environment.host} was found; `wandb login` stores one"
    if asked != "online" and not answers(environment.proxy or environment.host):
        return "offline", f"{environment.host} did not answer within {PROBE_SECONDS:g} s"
    return "online", by


def answers(url: str) -> bool:
    """Whether a TCP connection to the URL's host opens in time; on a thread, because looking up a name has no timeout."""
    opened: list[bool] = []

    def connect() -> None:
        try:
            parts = urlsplit(url if "://" in url else f"//{url}")
            port = parts.port or (80 if parts.scheme == "http" else 443)
            with socket.create_connection((parts.hostname or "", port), PROBE_SECONDS):
                opened.append(True)
        except (OSError, ValueError):
            return

    thread = threading.Thread(target=connect, name="W&B probe", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(opened)


def open_run(config: Config, folder: Path, run_id: str, mode: Mode, say: Say) -> "WandbTracker":
    """Import wandb and begin the run; online where that works, else offline with one line."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))

    def begin(mode: Mode) -> "wandb.Run":
        settings = wandb.Settings(
            mode=mode,
            console="off",
            disable_git=True,
            disable_job_creation=True,
            host="",
            program="train.py",
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            init_timeout=INIT_SECONDS,
            save_code=False,
            silent=True,
            # Not x_disable_machine_info: it would silence the measurements too.
            x_disable_meta=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.wandb.name,
            tags=list(config.wandb.tags),
            config=config.model_dump(mode="json"),
            dir=str(folder),
            id=run_id,
            resume="allow",
            settings=settings,
        )

    try:
        run = begin(mode)
    except Exception as error:
        # The service still holds the id of the run that failed; a fresh one does not.
        wandb.teardown()
        if mode == "offline":
            raise
        say(f"W&B: offline, the host refused: {describe(error)}")
        run = begin("offline")
    if not run.offline:
        say(f"W&B: {run.url}")
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    for name, best in BEST.items():
        run.define_metric(name, step_metric="train/step", summary=best)
    tracker = WandbTracker(run, config, folder, say)
    try:
        tracker.log_files()
    except Exception as error:
        say(f"W&B: code, config and tokenizer are not uploaded: {describe(error)}")
    return tracker


def list_code() -> list[tuple[Path, str]]:
    """The files that may be sent as code, and their names there: this package's, and train.py of the clone it lies in."""
    package = Path(__file__).parents[1]
    found = [(path, f"smollm2/{path.relative_to(package)}") for path in sorted(package.rglob("*.py"))]
    root = package.parent
    is_clone = (root / "run_training.sh").exists()
    return [*found, (root / "train.py", "train.py")] if is_clone else found


class WandbTracker(Tracker):
    """One W&B run; lives behind a fence."""

    def __init__(self, run: "wandb.Run", config: Config, folder: Path, say: Say) -> None:
        self.run, self.config, self.folder, self.say = run, config, folder.absolute(), say
        self.table: Any = None
        self.is_closing, self.has_said_thinned = False, False

    def log_files(self) -> None:
        """The effective config, the tokenizer and the code, as artifacts."""
        self._log_artifact("config", "config", [(self.folder / "config.yaml", "config.yaml")])
        self._log_artifact("tokenizer", "tokenizer", [(self.folder / "tokenizer" / "tokenizer.json", "tokenizer.json")])
        if self.config.wandb.log_code:
            self._log_artifact("code", "code", list_code())

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """A row."""
        self._log_row(step, group_metrics(metrics))

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """A round more in the table of samples; W&B shows its cells as plain text."""
        import wandb

        if self.table is None or len(self.table.data) >= TABLE_ROWS:
            self.table = wandb.Table(columns=["step", "prompt", "text"], log_mode="INCREMENTAL")
        for sample in samples:
            self.table.add_data(step, sample.prompt, sample.text)
        self._log_row(step, {"samples/table": self.table})

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """Nothing: messages may name paths of this machine; they stay in the run folder."""

    def log_diagnosis(self, diagnosis: Diagnosis, step: int) -> None:
        """Norms by layer, histograms by parameter, and the flow through the layers as a figure."""
        if not self.config.wandb.log_gradients:
            return
        import numpy
        import wandb

        row: dict[str, object] = dict(diagnosis_metrics(diagnosis))
        for group, histograms in (
            ("gradients", diagnosis.gradient_histograms),
            ("parameters", diagnosis.weight_histograms),
        ):
            for name, histogram in histograms.items():
                pair = (numpy.asarray(histogram.counts), numpy.asarray(histogram.edges))
                row[f"{group}/histogram/{name}"] = wandb.Histogram(np_histogram=pair)
        self._log_row(step, row | {"gradients/flow": wandb.Plotly(draw_flow(diagnosis))})

    def log_landscape(self, landscape: Landscape, step: int) -> None:
        """A surface that can be turned, and the line through it."""
        import wandb

        surface, line = draw_landscape(landscape)
        row = {"landscape/surface": wandb.Plotly(surface), "landscape/line": wandb.Plotly(line)}
        self._log_row(step, {**row, "landscape/loss": landscape.loss})

    def save_file(self, path: Path, step: int, *, is_best: bool) -> None:
        """A checkpoint as a version of one artifact. `path` is its second name, which goes as soon as it is not needed."""
        original = self.folder / path.name
        if self.run.offline:
            path.unlink(missing_ok=True)
            if self.config.training.keep_last is None:
                self._log_checkpoint(original, step, is_best)
            elif not self.has_said_thinned:
                self.has_said_thinned = True
                self.say(
                    "W&B: offline, and training.keep_last removes checkpoints, so none will be uploaded by wandb sync"
                )
            return
        try:
            artifact = self._log_checkpoint(path, step, is_best)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        threading.Thread(target=self._release, args=(artifact, path), name=f"W&B {path.name}", daemon=True).start()

    def close(self) -> None:
        """Send the rest, for a bounded time; say how an offline run, or what is left of an online one, is uploaded."""
        import wandb

        where = shlex.quote(str(Path(self.run.dir).parent))
        self.is_closing = True
        try:
            self.run.finish()
            remove_links(self.folder)
        except TimeoutError:
            self.say(f"W&B: not all was uploaded within {FINISH_SECONDS:g} s; send the rest with: wandb sync {where}")
        finally:
            # Its service ends here and not in a hook at the end of Python, which would print a traceback where it died.
            wandb.teardown()
        if self.run.offline:
            self.say(f"W&B: the run is kept offline; upload it with: wandb sync {where}")

    def _log_row(self, step: int, row: Mapping[str, object]) -> None:
        self.run.log({"train/step": step, **row})

    def _log_checkpoint(self, path: Path, step: int, is_best: bool) -> "wandb.Artifact":
        """Under the names latest, step_0500 and best. Not copied: immutable, by an absolute path, past wandb's cache."""
        import wandb

        artifact = wandb.Artifact(f"checkpoints-{self.run.id}", "model", metadata={"step": step})
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
        return self.run.log_artifact(artifact, aliases=["latest", path.stem, *(["best"] if is_best else [])])

    def _log_artifact(self, name: str, kind: str, files: Sequence[tuple[Path, str]]) -> None:
        """Small files, copied first into the run's wandb folder: they may change before they are sent."""
        import wandb

        artifact = wandb.Artifact(name, kind)
        for path, entry in files:
            artifact.add_file(str(path), name=entry, skip_cache=True)
        self.run.log_artifact(artifact)

    def _release(self, artifact: "wandb.Artifact", path: Path) -> None:
        """A thread for each upload: asking wandb whether one has ended, with a timeout, would cancel it."""
        try:
            artifact.wait()
        except Exception as error:
            if self.is_closing:  # its service has gone; `close` decides
                return
            self.say(f"W&B: {path.name} may not have arrived: {describe(error)}")
        path.unlink(missing_ok=True)


def draw_flow(diagnosis: Diagnosis) -> Any:
    """A plotly figure: the norms of gradients and weights and the update ratio, layer after layer."""
    from plotly import graph_objects

    flows = flow_by_layer(diagnosis)
    curves = {
        "gradient norm": [flow.gradient_norm for flow in flows.values()],
        "weight norm": [flow.weight_norm for flow in flows.values()],
        "update / weight": [flow.update_ratio for flow in flows.values()],
    }
    lines = [graph_objects.Scatter(x=list(flows), y=finite(ys), name=name) for name, ys in curves.items()]
    figure = graph_objects.Figure(lines, layout={"template": "none", "yaxis": {"type": "log"}})
    return figure.update_layout(title="Gradient flow", xaxis_title="layer")


def draw_landscape(landscape: Landscape) -> tuple[Any, Any]:
    """Two plotly figures: the surface over both directions, and the line along the first."""
    from plotly import graph_objects

    at = list(landscape.grid_at)
    # z[i][j] stands over x[j] and y[i], and the first direction is the grid's first index.
    surface = graph_objects.Surface(x=at, y=at, z=[finite(row) for row in landscape.grid])
    axes = {"xaxis_title": "second direction", "yaxis_title": "first direction", "zaxis_title": "loss"}
    line = graph_objects.Scatter(x=list(landscape.line_at), y=finite(landscape.line), name="loss")
    bare = {"template": "none", "title": f"Loss around the weights: {landscape.loss:.4f} at the centre"}
    return (
        graph_objects.Figure([surface], layout=bare).update_layout(scene=axes),
        graph_objects.Figure([line], layout=bare).update_layout(xaxis_title="first direction", yaxis_title="loss"),
    )
