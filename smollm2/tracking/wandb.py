"""The mirror in Weights & Biases: the only importer of wandb, and only inside a function.

Online or offline is decided before `init`, since that blocks for a minute and more where the host is dead. Everything of
wandb, its import too, runs on the fence's thread: training starts at once. What wandb would send unasked (git remote and
diff, package list, host, argv, stdout, code) is turned off. Rows carry their own step, `train/step`: wandb's `step=`
drops the rows that a resume writes again.
"""

import configparser
import html
import importlib.util
import netrc
import secrets
import shlex
import socket
import string
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from smollm2.config import WandbConfig
from smollm2.tracking.base import Fence, Sample, Say, Tracker, describe

if TYPE_CHECKING:
    import wandb

DEFAULT_HOST = "https://api.wandb.ai"
PROBE_SECONDS = 2.0
INIT_SECONDS = 10.0
FINISH_SECONDS = 20.0

Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbEnvironment:
    """What the machine says about W&B; `prepare_environment` fills it in."""

    key_present: bool = False
    mode: str | None = None
    host: str = DEFAULT_HOST
    proxy: str | None = None


def prepare_environment(variables: MutableMapping[str, str]) -> WandbEnvironment:
    """Read the variables of this process (`os.environ`) and the files in which `wandb login` leaves host and key.

    Sets WANDB_ERROR_REPORTING=false where the user has not set it: wandb 0.31 has no other switch for the telemetry that
    it sends about itself, which also held back the end of the process for 20 s where the host hangs (measured 2026-11).
    """
    variables.setdefault("WANDB_ERROR_REPORTING", "false")
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
    config: WandbConfig,
    run_config: dict[str, object],
    folder: Path,
    run_id: str,
    environment: WandbEnvironment,
    say: Say,
) -> Tracker | None:
    """A tracker that mirrors the run, or None with one line that says why not. Takes two seconds at most.

    `run_config` is what W&B shows as the run's config. `run_id` makes a resume go on in the same W&B run.
    """
    if importlib.util.find_spec("wandb") is None:
        say("W&B - wandb is not installed - training goes on without it; pip install 'smollm2-training[wandb]'")
        return None
    mode, reason = decide_mode(config, environment)
    if mode == "disabled":
        say(f"W&B - {reason} - training goes on without it")
        return None
    if mode == "offline":
        say(f"W&B: offline, {reason}")
    return Fence("W&B", lambda: open_run(config, run_config, folder, run_id, mode, say), say)


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


def open_run(
    config: WandbConfig, run_config: dict[str, object], folder: Path, run_id: str, mode: Mode, say: Say
) -> "WandbTracker":
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
            finish_timeout=FINISH_SECONDS,
            init_timeout=INIT_SECONDS,
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name,
            tags=list(config.tags),
            config=run_config,
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
    return WandbTracker(run, say)


class WandbTracker(Tracker):
    """One W&B run; lives behind a fence."""

    def __init__(self, run: "wandb.Run", say: Say) -> None:
        self.run = run
        self.say = say

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """A row; `validation_loss` becomes `validation/loss`, `loss` becomes `train/loss`."""
        self.run.log({"train/step": step} | {group_name(name): value for name, value in metrics.items()})

    def log_text(self, samples: Sequence[Sample], step: int) -> None:
        """One page of text, whose characters are shown and never obeyed.

        Not a wandb.Table: offline it leaves the rows as an artifact in the home folder, where `wandb sync` of a copied run
        folder does not find them.
        """
        import wandb

        pages = [f"<b>{html.escape(sample.prompt)}</b>{html.escape(sample.text)}" for sample in samples]
        page = wandb.Html(f'<pre style="white-space: pre-wrap">{"<hr>".join(pages)}</pre>', inject=False)
        self.run.log({"train/step": step, "samples/text": page})

    def log_event(self, kind: str, message: str, step: int, **details: object) -> None:
        """Nothing: messages may name paths of this machine; they stay in the run folder."""

    def close(self) -> None:
        """Send the rest, for a bounded time; say how an offline run is uploaded later."""
        import wandb

        offline, where = self.run.offline, Path(self.run.dir).parent
        try:
            self.run.finish()
        finally:
            # Its service ends here and not in a hook at the end of Python, which would print a traceback where it died.
            wandb.teardown()
        if offline:
            self.say(f"W&B: the run is kept offline; upload it with: wandb sync {shlex.quote(str(where))}")


def group_name(name: str) -> str:
    """W&B draws one section per group."""
    group, _, rest = name.partition("_")
    return f"validation/{rest}" if group == "validation" else f"train/{name}"
