"""The Weights & Biases tracker: the only module that imports wandb, and only inside functions.

All of wandb, including its import, runs on the tracker's own thread, so training starts at once. What wandb would send
without being asked (git remote and diff, package list, host, program, argv, stdout, code) is turned off; only the
machine's load is still sent. Rows have their own step, `train/step`: with wandb's `step=`, the rows that a resume
writes again would be dropped.

Nothing is written to the home folder: what wandb copies before an upload is stored in the run's own wandb folder.
Checkpoints are not copied at all: during its upload, a checkpoint has a hard link there, so that `keep_last` may remove
the original. An offline run refers to the original.
"""

import contextlib
import importlib.util
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2.config.schema import Config
from smollm2.formatting import format_bytes
from smollm2.plan.arithmetic import estimate_disk
from smollm2.storage.run_folder import CONFIG, TOKENIZER
from smollm2.tracking.base import (
    Diagnosis,
    Event,
    Fence,
    Landscape,
    Message,
    Metrics,
    Report,
    Sample,
    Samples,
    SavedFile,
    Tracker,
    describe,
)
from smollm2.tracking.charts import (
    Figure,
    baseline_metrics,
    diagnosis_metrics,
    flow_figure,
    group_metrics,
    landscape_figures,
)
from smollm2.tracking.wandb_environment import Mode, WandbEnvironment, decide_mode
from smollm2.tracking.wandb_links import CheckpointLinks, remove_links

if TYPE_CHECKING:
    import wandb

INIT_SECONDS = 10.0
FINISH_SECONDS = 15.0
CLOSE_SECONDS = 21.0
"""Seconds allowed for emptying the queue and finishing; together with KILL_SECONDS, this delays the end of a run by
less than 30 s."""

KILL_SECONDS = 3.0
"""Seconds before wandb's service process is killed. Otherwise wandb would wait for it at Python's exit, for as long as
the host hangs."""

TABLE_ROWS = 1000
"""The maximum number of samples in one table: each round added to a table lists all its earlier rounds again."""

BEST = {"validation/loss": "min", "validation/bpb": "min", "train/loss": "min", "train/tokens_per_second": "max"}
"""Which value of these metrics a run's summary shows; for all other metrics, it shows the last value."""


def start_wandb(
    config: Config, folder: Path, run_id: str, environment: WandbEnvironment, report: Report, done: int = 0
) -> Tracker | None:
    """Return a tracker for W&B, or report why there is none and return None. This takes at most two seconds.

    A resume with the same `run_id` continues the same W&B run; `done` is the number of completed steps.
    """
    if importlib.util.find_spec("wandb") is None:
        report("W&B: wandb is not installed, the run continues without it. Run pip install 'smollm2-training[wandb]'.")
        return None
    mode, reason = decide_mode(config.wandb, environment)
    if mode == "disabled":
        report(f"W&B: {reason}, the run continues without it")
        return None
    if mode == "offline":
        report(f"W&B: offline, {reason}")
    if config.wandb.log_checkpoints != "none" and (mode == "online" or config.training.keep_last is None):
        report(f"W&B: {describe_upload(config, done)}")
    remove_links(folder)
    links = CheckpointLinks(folder, config.wandb, report)
    return Fence(
        "W&B",
        lambda: open_run(config, folder, run_id, mode, report),
        report,
        keep_file=links.keep,
        abandon=lambda: threading.Thread(target=end_service, name="W&B end", daemon=True).start(),
        close_seconds=CLOSE_SECONDS,
    )


def end_service() -> None:
    """Wait KILL_SECONDS, then kill this process's wandb service. Without /proc, the service is left to exit."""
    time.sleep(KILL_SECONDS)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


def describe_upload(config: Config, done: int) -> str:
    """Describe the number and size of the checkpoints that the rest of the run will upload."""
    t, size = config.training, estimate_disk(config).checkpoint_bytes
    count = math.ceil(t.train_steps / t.save_interval) - done // t.save_interval if t.save_interval else 1
    kind, most = ("checkpoints", "") if config.wandb.log_checkpoints == "all" else ("best checkpoints", "at most ")
    return (
        f"{most}{count} {kind} of {format_bytes(size)} = {format_bytes(size * count)} will be uploaded. "
        "To upload none: --wandb.log_checkpoints none."
    )


def open_run(config: Config, folder: Path, run_id: str, mode: Mode, report: Report) -> "WandbTracker":
    """Import wandb and start the run in `mode`; if that fails online, report it and start offline."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))

    try:
        run = init_run(config, folder, run_id, mode)
    except Exception as error:
        # The service still holds the id of the failed run; a new service does not.
        wandb.teardown()
        if mode == "offline":
            raise
        report(f"W&B: offline, the host refused ({describe(error)})")
        run = init_run(config, folder, run_id, "offline")
    if not run.offline:
        report(f"W&B: {run.url}")
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    for name, best in BEST.items():
        run.define_metric(name, step_metric="train/step", summary=best)
    tracker = WandbTracker(run, config, folder, report)
    try:
        tracker.log_files()
    except Exception as error:
        report(f"W&B: code, config and tokenizer are not uploaded ({describe(error)})")
    return tracker


def init_run(config: Config, folder: Path, run_id: str, mode: Mode) -> "wandb.Run":
    """Start the run in the given mode, with everything turned off that wandb would send without being asked."""
    import wandb

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
        # Not x_disable_machine_info: it would turn off the measurements of the load too.
        x_disable_meta=True,
        x_save_requirements=False,
    )
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.wandb.name or folder.resolve().name,
        tags=list(config.wandb.tags),
        config=config.model_dump(mode="json"),
        dir=str(folder),
        id=run_id,
        resume="allow",
        settings=settings,
    )


def list_code() -> list[tuple[Path, str]]:
    """Return the files to send as code, with their names: this package's files, and train.py if this is a clone."""
    package = Path(__file__).parents[1]
    found = [(path, f"smollm2/{path.relative_to(package)}") for path in sorted(package.rglob("*.py"))]
    root = package.parent
    is_clone = (root / "run_training.sh").exists()
    return [*found, (root / "train.py", "train.py")] if is_clone else found


class WandbTracker(Tracker):
    """Sends one run to W&B. It runs on its own thread, in a `Fence`."""

    def __init__(self, run: "wandb.Run", config: Config, folder: Path, report: Report) -> None:
        self.run, self.config, self.folder, self.report = run, config, folder.absolute(), report
        self.table: Any = None
        self.baselines: dict[str, float] = {}
        self.is_closing, self.has_reported_pruning = False, False

    def log_files(self) -> None:
        """Send the effective config, the tokenizer and the code as artifacts."""
        self._log_artifact("config", "config", [(self.folder / CONFIG, CONFIG)])
        self._log_artifact("tokenizer", "tokenizer", [(self.folder / TOKENIZER / "tokenizer.json", "tokenizer.json")])
        if self.config.wandb.log_code:
            self._log_artifact("code", "code", list_code())

    def on(self, message: Message) -> None:
        """Send the message. Of the events, only the numbers of the baselines are sent, as lines beside the validation loss:
        their texts may contain paths on this machine."""
        match message.content:
            case Metrics(values):
                lines = self.baselines if "validation_loss" in values else {}
                self._log_row(message.step, {**group_metrics(values), **lines})
            case Event("baselines", _, details):
                self.baselines = baseline_metrics(details)
            case Samples(samples):
                self._log_samples(message.step, samples)
            case Diagnosis() as diagnosis if self.config.wandb.log_gradients:
                self._log_diagnosis(message.step, diagnosis)
            case Landscape() as landscape:
                self._log_landscape(message.step, landscape)
            case SavedFile(path, is_best):
                self._send_checkpoint(message.step, path, is_best)

    def close(self) -> None:
        """Finish the upload within a time limit; report how to upload an offline run, or the rest of an online one."""
        import wandb

        folder = shlex.quote(str(Path(self.run.dir).parent))
        self.is_closing = True
        try:
            self.run.finish()
            remove_links(self.folder)
        except TimeoutError:
            self.report(
                f"W&B: the upload did not finish within {FINISH_SECONDS:g} s. Send the rest with: wandb sync {folder}"
            )
        finally:
            # End the service here and not in an exit hook of Python, which would print a traceback if it has died.
            wandb.teardown()
        if self.run.offline:
            self.report(f"W&B: the run was recorded offline. Upload it with: wandb sync {folder}")

    def _log_row(self, step: int, row: Mapping[str, object]) -> None:
        self.run.log({"train/step": step, **row})

    def _log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Add the samples of one step to the table of samples; W&B shows its cells as plain text."""
        import wandb

        if self.table is None or len(self.table.data) >= TABLE_ROWS:
            self.table = wandb.Table(columns=["step", "prompt", "text"], log_mode="INCREMENTAL")
        for sample in samples:
            self.table.add_data(step, sample.prompt, sample.text)
        self._log_row(step, {"samples/table": self.table})

    def _log_diagnosis(self, step: int, diagnosis: Diagnosis) -> None:
        """Log norms by layer, histograms by parameter, and a figure of the gradient flow through the layers."""
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
        self._log_row(step, row | {"gradients/flow": as_media(flow_figure(diagnosis))})

    def _log_landscape(self, step: int, landscape: Landscape) -> None:
        """Log the landscape as a surface that can be rotated, and as a line along its first direction."""
        figures = landscape_figures(landscape)
        row = {f"landscape/{name}": as_media(figures[name]) for name in ("surface", "line")}
        self._log_row(step, {**row, "landscape/loss": landscape.loss})

    def _send_checkpoint(self, step: int, path: Path, is_best: bool) -> None:
        """Send a checkpoint as a version of one artifact. `path` is its hard link, removed when no longer needed."""
        original = self.folder / path.name
        if self.run.offline:
            path.unlink(missing_ok=True)
            if self.config.training.keep_last is None:
                self._log_checkpoint(original, step, is_best)
            elif not self.has_reported_pruning:
                self.has_reported_pruning = True
                self.report(
                    "W&B: the run is offline and training.keep_last removes checkpoints, so wandb sync will upload none"
                )
            return
        try:
            artifact = self._log_checkpoint(path, step, is_best)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        threading.Thread(target=self._release, args=(artifact, path), name=f"W&B {path.name}", daemon=True).start()

    def _log_checkpoint(self, path: Path, step: int, is_best: bool) -> "wandb.Artifact":
        """Send a checkpoint with the aliases `latest`, its step (`step_0500`) and, if it is the best, `best`.

        It is marked immutable and not cached, so wandb does not copy it.
        """
        import wandb

        artifact = wandb.Artifact(f"checkpoints-{self.run.id}", "model", metadata={"step": step})
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
        return self.run.log_artifact(artifact, aliases=["latest", path.stem, *(["best"] if is_best else [])])

    def _log_artifact(self, name: str, kind: str, files: Sequence[tuple[Path, str]]) -> None:
        """Send small files as one artifact.

        wandb first copies them to the run's wandb folder, because they may change before the upload.
        """
        import wandb

        artifact = wandb.Artifact(name, kind)
        for path, entry in files:
            artifact.add_file(str(path), name=entry, skip_cache=True)
        self.run.log_artifact(artifact)

    def _release(self, artifact: "wandb.Artifact", path: Path) -> None:
        """Remove the hard link after the upload.

        Each upload has its own thread, because waiting with a timeout would cancel it.
        """
        try:
            artifact.wait()
        except Exception as error:
            if self.is_closing:  # the service has ended; `close` reports it
                return
            self.report(f"W&B: {path.name} may not have been uploaded ({describe(error)})")
        path.unlink(missing_ok=True)


def as_media(figure: Figure) -> Any:
    """Return plotly JSON as a W&B chart."""
    import wandb
    from plotly import graph_objects

    return wandb.Plotly(graph_objects.Figure(figure, layout_template="none"))
