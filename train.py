"""The user's entry: `python train.py ...` is `smollm2 train ...`.

It is read by any Python 3. Where the Python at hand is too old or lacks the package's dependencies, the same command
starts again with the one in .venv beside this file; where that cannot help either, one line says what to do.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STARTED_AGAIN = "SMOLLM2_STARTED_AGAIN"
DEPENDENCIES = [
    "accelerate",
    "jinja2",
    "numpy",
    "plotly",
    "psutil",
    "pydantic",
    "yaml",
    "rich",
    "safetensors",
    "tiktoken",
    "tokenizers",
    "torch",
]


def name_what_is_missing() -> str:
    """What this Python lacks, in words; empty where it can train. Nothing is imported for the answer."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the file is also started by older ones
        return "it is older than 3.11"
    from importlib.util import find_spec

    missing = [name for name in DEPENDENCIES if find_spec(name) is None]
    return "it has no " + ", ".join(missing) if missing else ""


def start_again(python: str) -> int:
    """The same command with another Python; returns only on Windows, where a process cannot become another."""
    os.environ[STARTED_AGAIN] = "1"
    command = [python, str(HERE / "train.py")] + sys.argv[1:]  # noqa: RUF005 - older Pythons read this
    if os.name == "nt":
        import subprocess

        return subprocess.call(command)
    return os.execv(python, command)


def run() -> int:
    """Train here, or with .venv's Python, or say why neither is possible."""
    is_second_start = os.environ.pop(STARTED_AGAIN, "") != ""
    problem = name_what_is_missing()
    if not problem:
        from smollm2.cli.main import main

        return main(["train"] + sys.argv[1:])  # noqa: RUF005 - older Pythons read this
    for place in ("bin/python", "Scripts/python.exe"):
        python = HERE / ".venv" / place
        if python.exists() and not is_second_start:
            return start_again(str(python))
    script = str(HERE / "scripts" / "environment.sh")
    sys.stderr.write(sys.executable + " - this Python cannot train: " + problem + " - run " + script + " once\n")
    return 2


if __name__ == "__main__":
    sys.exit(run())
