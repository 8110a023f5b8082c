"""A tiny run that is prepared and not trained, for tests of what happens in between."""

from collections.abc import Mapping
from pathlib import Path

from runs import tiny_config

from smollm2.config.schema import Config
from smollm2.runtime.device import start_runtime
from smollm2.tracking.console import ConsoleTracker
from smollm2.training.loop import Prepared, prepare
from smollm2.training.setup import Setup


def prepare_run(folder: Path, flags: Mapping[str, str] | None = None) -> Prepared:
    """Return the run of the config in `folder`, with some keys changed, as it is before its first step."""
    given = {key.replace(".", "__"): value for key, value in (flags or {}).items()}
    return prepare_config(tiny_config(folder, **given))


def prepare_config(config: Config) -> Prepared:
    """Return the run of a config as it is before its first step."""
    Path(config.training.save_dir).mkdir(parents=True, exist_ok=True)
    runtime = start_runtime(config.training)
    return prepare(Setup(config, {}, runtime, ConsoleTracker(1, 0)), "", None)
