"""The shape of the model that a run starts from (model.init_from): it fills the section `model` of the config."""

import re
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from smollm2.config.hub import MODEL, fetch_from_hub
from smollm2.config.model_folder import read_hugging_face_config
from smollm2.config.schema import Config, ModelConfig
from smollm2.config.values import Given, Level, expand_path, locate
from smollm2.config.yaml_nodes import quote, show
from smollm2.errors import ConfigError, lay_out

SHAPE_FILES = ("config.json", "config.yaml")
"""The file that holds the shape: of a Hugging Face folder, and of a run folder."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

WHICH_FOLDER = (
    "give the folder of a model, the run folder of a checkpoint, or a name on the hub; to resume a run without it, give the "
    "run's own config.yaml as --config"
)

OWN_KEYS = {"init_from", "initializer_range"}
"""Keys of `model` that do not describe the shape of a trained model."""


def find_model_folder(name: str, report: Callable[[str], None] = lambda message: None) -> Path:
    """Return the folder of a model: `name` itself, or its copy from the Hugging Face hub.

    Raise ConfigError if there is none, DataError if the hub does not have it or cannot be reached.
    """
    if problem := find_problem(name):
        raise ConfigError("model.init_from", problem, WHICH_FOLDER)
    folder = Path(expand_path(name))
    return folder if folder.is_dir() else fetch_from_hub(name, MODEL, report)


def find_problem(name: str) -> str:
    """Return why no model can have this name, or an empty string."""
    try:
        folder = Path(expand_path(name))
    except ValueError:
        return f"{quote(name)} is not a path"
    if folder.is_dir() or (HUB_NAME.fullmatch(name) and not folder.exists()):
        return ""
    return f"{quote(name)} is a file, not a folder" if folder.exists() else f"there is no folder {quote(name)}"


def read_initial_shape(folder: Path, load: Callable[[Path], Config]) -> tuple[ModelConfig, str]:
    """Return the shape of the model in a folder, and the name of the file that says so. `load` reads a run's config.

    Raise CheckpointError or ConfigError if there is none or it is not supported.
    """
    hugging_face, own = (folder / name for name in SHAPE_FILES)
    if own.exists() and not hugging_face.exists():
        return load(own).model, str(own)
    return read_hugging_face_config(folder), str(hugging_face)


def follow_initial_model(given: Level, problems: list[str], load: Callable[[Path], Config]) -> Level:
    """Return the shape of the model that the run starts from, if there is one; report given values that contradict it.

    The shape and the tokenizer of a preset are for training from scratch, so they give way without a word.

    Raise CheckpointError or DataError if the model cannot be read or computed.
    """
    one = given.get("model.init_from")
    if one is None or not isinstance(one.value, str):
        return {}
    if problem := find_problem(one.value):
        problems.append(lay_out(locate("model.init_from", one.origin), problem, WHICH_FOLDER))
        return {}
    folder = find_model_folder(one.value)
    shape, file = read_initial_shape(folder, load)
    chosen = {key: value for key, value in given.items() if not value.origin.startswith("preset ")}
    own = {key.removeprefix("model."): value for key, value in chosen.items() if key.startswith("model.")}
    for name in own.keys() - OWN_KEYS:
        found, wanted = read_as(shape, name, own[name].value), getattr(shape, name)
        if found != wanted:
            where = locate(f"model.{name}", own[name].origin)
            what = f"is {found}, but {file} has {wanted}"
            problems.append(lay_out(where, what, "leave it out: model.init_from brings the shape of the model"))
    found = {f"model.{key}": value for key, value in shape.model_dump(exclude=OWN_KEYS).items() if key not in own}
    if "data.tokenizer" not in chosen:
        found["data.tokenizer"] = "auto"  # the model's
    return {key: Given(value, show(value), file) for key, value in found.items()}


def read_as(shape: ModelConfig, name: str, value: object) -> object:
    """Return a value as the type of its key, or unchanged if it is invalid."""
    try:
        return getattr(ModelConfig.model_validate({**shape.model_dump(), name: value}), name)
    except ValidationError:
        return value
