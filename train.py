"""The user's entry: `python train.py ...` is `smollm2 train ...`.

Any Python 3 can parse this file. If the Python that runs it is too old or lacks the package's dependencies, the same
command starts again with the Python in .venv beside this file; if that cannot train either, one line says what to do.
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


def describe_missing() -> str:
    """Return what this Python lacks, or an empty string if it can train. No dependency is imported."""
    if sys.version_info < (3, 11):  # noqa: UP036 - older Pythons start this file too
        return "is older than 3.11"
    from importlib.util import find_spec

    missing = [name for name in DEPENDENCIES if find_spec(name) is None]
    return "lacks " + ", ".join(missing) if missing else ""


def start_again(python: str) -> int:
    """Run the same command with another Python; return only on Windows, where a process cannot be replaced."""
    os.environ[STARTED_AGAIN] = "1"
    command = [python, str(HERE / "train.py")] + sys.argv[1:]  # noqa: RUF005 - older Pythons read this
    if os.name == "nt":
        import subprocess

        return subprocess.call(command)
    return os.execv(python, command)


def run() -> int:
    """Train here or with the Python in .venv, or print why neither is possible; return the exit code."""
    is_second_start = os.environ.pop(STARTED_AGAIN, "") != ""
    problem = describe_missing()
    if not problem:
        from smollm2.cli.main import main

        return main(["train"] + sys.argv[1:])  # noqa: RUF005 - older Pythons read this
    for place in ("bin/python", "Scripts/python.exe"):
        python = HERE / ".venv" / place
        if python.exists() and not is_second_start:
            return start_again(str(python))
    script = str(HERE / "scripts" / "environment.sh")
    sys.stderr.write(sys.executable + ": " + problem + ". Run " + script + " once.\n")
    return 2


if __name__ == "__main__":
    sys.exit(run())
