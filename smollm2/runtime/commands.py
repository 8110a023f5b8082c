"""Commands as the user can type them: relative to where run_training.sh was called, without activating .venv."""

import os
import shlex
import shutil
import sys
from pathlib import Path

CALLER = "SMOLLM2_CALLER"
"""The variable in which run_training.sh, which changes to its own folder, stores the folder it was called from."""


def shown_path(path: Path) -> str:
    """Return a path as the user can type it: relative if it is below the user's folder, else absolute."""
    folder = Path(os.environ.get(CALLER) or Path.cwd())
    whole = Path(os.path.normpath(Path.cwd() / path))  # links stay: .venv's Python is a link to the system's
    return shlex.quote(str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole))


def shown_script(path: Path) -> str:
    """Return a shell script as the user can type it: `./run_training.sh` for one in the user's folder."""
    name = shown_path(path)
    return name if "/" in name else f"./{name}"


def smollm2_command(python: Path | None = None) -> str:
    """Return `smollm2` if that runs this environment's command, else its path. `python` defaults to the current one."""
    python = python or Path(sys.executable)
    command = python.with_name(f"smollm2{python.suffix}")
    if not command.exists():
        return f"{shown_path(python)} -m smollm2"
    found = shutil.which("smollm2")
    return "smollm2" if found and Path(found).absolute() == command else shown_path(command)
