"""Decide from the config and the machine whether W&B runs online, offline or not at all, before wandb is imported.

Online or offline is decided before `wandb.init`, because that call blocks for over a minute if the host is down.
"""

import configparser
import netrc
import secrets
import socket
import string
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from smollm2.config.schema import WandbConfig

DEFAULT_HOST = "https://api.wandb.ai"
PROBE_SECONDS = 2.0

OWN_FOLDER = Path("wandb", "smollm2")
OWN_FOLDERS = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
"""Environment variables for the folders of wandb's copies and logs (by default in the home folder), and the subfolders
that replace those folders."""

Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbEnvironment:
    """The W&B settings found on this machine."""

    key_present: bool = False
    mode: str | None = None
    host: str = DEFAULT_HOST
    proxy: str | None = None


def prepare_environment(variables: MutableMapping[str, str], folder: Path) -> WandbEnvironment:
    """Return the W&B settings in the environment variables and in the files where `wandb login` stores host and key.

    `variables` are those of this process (`os.environ`). Also set the ones for which wandb 0.31 has no other switch,
    unless the user has set them: WANDB_ERROR_REPORTING=false (wandb's own telemetry, which also delayed the end of the
    process by 20 s if the host hung; measured 2026-11), and the folders of its copies and logs, which are moved into
    the run folder `folder`.
    """
    variables.setdefault("WANDB_ERROR_REPORTING", "false")
    for name, subfolder in OWN_FOLDERS.items():
        ending = str(OWN_FOLDER / subfolder)
        if variables.get(name, ending).endswith(ending):  # or set by an earlier run in this process
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
    """Return wandb's own settings from its settings file, or an empty dictionary if the file is missing or damaged."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
        return dict(parser["default"])
    except (OSError, ValueError, KeyError, configparser.Error):
        return {}


def holds_key(path: Path, host: str) -> bool:
    """Return whether a netrc file has a password for the host."""
    try:
        found = netrc.netrc(str(path)).authenticators(urlsplit(host).netloc)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])


def make_run_id() -> str:
    """Return a run ID of eight characters, like wandb's own.

    It is drawn from the operating system, so that no random state changes.
    """
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def decide_mode(config: WandbConfig, environment: WandbEnvironment) -> tuple[Mode, str]:
    """Return `online`, `offline` or `disabled`, and the reason. The config's mode overrides the environment's."""
    asked, by = (environment.mode or "auto", "WANDB_MODE") if config.mode == "auto" else (config.mode, "wandb.mode")
    if asked == "disabled":
        return "disabled", f"{by} is disabled"
    if asked in ("offline", "dryrun"):
        return "offline", f"{by} is {asked}"
    if not environment.key_present:
        return "offline", f"no key for {environment.host} (`wandb login` stores one)"
    if asked != "online" and not is_reachable(environment.proxy or environment.host):
        return "offline", f"{environment.host} did not answer within {PROBE_SECONDS:g} s"
    return "online", by


def is_reachable(url: str) -> bool:
    """Return whether a TCP connection to the URL's host opens within PROBE_SECONDS.

    A thread opens it, because a DNS lookup has no timeout.
    """
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
