"""Files of a repository on the Hugging Face hub: from the local cache, or downloaded after a notice."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2.errors import DataError


@dataclass(frozen=True)
class HubKind:
    """A kind of repository, and how messages name it."""

    what: str
    repo_type: str
    files: tuple[str, ...]  # patterns of the files to fetch
    needed: str  # pattern of a file without which a cached copy is incomplete
    local: str  # what else the name could stand for on this machine
    advice: str
    command: str  # downloads the repository


TOKENIZER = HubKind(
    "tokenizer",
    "model",
    ("tokenizer.json", "tokenizer_config.json", "config.json"),
    "tokenizer.json",
    "folder",
    "use an existing folder, `bytes` or `auto`",
    "hf download",
)

MODEL = HubKind(
    "model",
    "model",
    ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"),
    "config.json",
    "folder",
    "use an existing folder",
    "hf download",
)

DATA_SET = HubKind(
    "data set",
    "dataset",
    tuple(f"*{kind}{compression}" for kind in (".parquet", ".jsonl", ".txt") for compression in ("", ".gz", ".zst")),
    "*",
    "file or folder",
    "check the name",
    "hf download --repo-type dataset",
)


def fetch_from_hub(name: str, kind: HubKind, report: Callable[[str], None]) -> Path:
    """Return the folder of hub repository `name`: from the local cache, else downloaded; `report` gets a line before that.

    Raise DataError if there is no such repository or it cannot be reached.
    """
    import huggingface_hub as hub

    absent = f"there is no such {kind.local}"
    fetch: dict[str, Any] = {"repo_type": kind.repo_type, "allow_patterns": list(kind.files)}
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True, **fetch))
        if any(folder.glob(kind.needed)):
            return folder
    except ValueError:  # not a valid repository name
        raise DataError(name, f"{absent}, and this is not a hub name", kind.advice) from None
    except OSError:
        pass
    report(f"{name}: the {kind.what} is not on this machine; trying the Hugging Face hub (25 s without a network)")
    try:
        return Path(hub.snapshot_download(name, etag_timeout=5, **fetch))
    except Exception as error:  # the library may change the class of its HTTP errors; none of them is a bug of ours
        what = f"{absent}, and the download from the hub failed ({type(error).__name__})"
        download = f"run `{kind.command} {name}` on a machine with network access"
        raise DataError(name, what, f"{download}, or {kind.advice}") from None
