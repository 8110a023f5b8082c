"""Commands as the user can type them: relative to where run_training.sh was called, and without activating .venv."""

import os
import shlex
import shutil
import sys
from pathlib import Path

CALLER = "SMOLLM2_CALLER"
"""The environment variable in which run_training.sh stores the folder it was called from, before changing to its
own."""


def shown_path(path: Path) -> str:
    """Return a path as the user can type it: relative if it is inside the user's folder, else absolute."""
    folder = Path(os.environ.get(CALLER) or Path.cwd())
    whole = Path(os.path.normpath(Path.cwd() / path))  # keeps links: .venv's Python is a link to the system's
    return shlex.quote(str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole))


def shown_script(path: Path) -> str:
    """Return a shell script's path as the user can type it: `./run_training.sh` if it is in the user's folder."""
    name = shown_path(path)
    return name if "/" in name else f"./{name}"


def smollm2_command(python: Path | None = None) -> str:
    """Return `smollm2` if the shell finds this environment's command under that name, else a longer command that works.

    `python` is the environment's interpreter, by default the current one.
    """
    python = python or Path(sys.executable)
    command = python.with_name(f"smollm2{python.suffix}")
    if not command.exists():
        return f"{shown_path(python)} -m smollm2"
    found = shutil.which("smollm2")
    return "smollm2" if found and Path(found).absolute() == command else shown_path(command)
