"""Read the text of a config from a file or a shipped preset."""

from difflib import get_close_matches
from pathlib import Path

from smollm2.config.values import expand_path
from smollm2.config.yaml_nodes import quote, show
from smollm2.errors import ConfigError

LARGEST_FILE = 2**16


def list_presets() -> dict[str, Path]:
    """Return the path of each preset by name. They are inside the package in a wheel, but beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((place for place in (package / "configs", package.parent / "configs") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_source(path: str | Path | None, preset: str | None) -> tuple[str, str]:
    """Return the name of the config source for use in messages, and its text."""
    if preset is not None and path is not None:
        raise ConfigError(
            f"--preset {show(preset)}", f"cannot be combined with --config {show(path)}", "use one of the two"
        )
    if preset is not None:
        presets = list_presets()
        if preset not in presets:
            near = get_close_matches(preset, presets, 1)
            advice = f"did you mean {near[0]}?" if near else f"use one of {', '.join(presets)}"
            raise ConfigError("--preset", f"unknown preset {quote(preset)}", advice)
        return f"preset {preset}", _read_text(presets[preset], f"preset {preset}")
    name = show(path or "config.yaml")
    try:
        return name, _read_text(Path(expand_path(str(path or "config.yaml"))), name)
    except FileNotFoundError:
        raise ConfigError(name, "no such file", "choose one with --config FILE, or use --preset nano") from None
    except ValueError:
        raise ConfigError(name, "is not a valid file name", "choose a config file with --config") from None


def _read_text(path: Path, name: str) -> str:
    """Return the text of a config file. Raise FileNotFoundError if it is missing, ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(name, f"cannot be read ({error.strerror})", "choose a config file with --config") from None
    if len(data) > LARGEST_FILE:
        raise ConfigError(name, f"is larger than {LARGEST_FILE // 1024} KB", "choose a config file with --config")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}", f"byte {error.start} is not valid UTF-8", "save the file as UTF-8"
        ) from None
