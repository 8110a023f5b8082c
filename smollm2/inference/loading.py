"""Load a trained model from a checkpoint (`.pt` or a folder), a run folder or a Hugging Face folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from smollm2.checkpoint.discovery import describe_missing, find_resumable, load_checkpoint
from smollm2.config.model_folder import read_hugging_face_config, read_json
from smollm2.config.schema import Config
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, restore_tokenizer
from smollm2.errors import CheckpointError
from smollm2.inference.weight_files import open_weights
from smollm2.inference.weights import build_model
from smollm2.model.transformer import SmolLM2
from smollm2.storage.run_folder import BEST, is_parted


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[SmolLM2, Tokenizer]:
    """Return the model, in evaluation mode and float32, and its tokenizer.

    `path` is a checkpoint, a run folder (the newest valid checkpoint is loaded) or a Hugging Face folder. Raise
    CheckpointError or DataError.
    """
    model, tokenizer, _ = load_source(Path(path))
    return model.to(device), tokenizer


def load_source(
    path: Path, *, best: bool = False, report: Callable[[str], None] = lambda message: None
) -> tuple[SmolLM2, Tokenizer, Mapping[str, Any] | None]:
    """Return the model (on the CPU), the tokenizer and the checkpoint's content (None for a Hugging Face folder).

    `best` selects a run folder's checkpoint with the lowest validation loss. `report` receives a line for each damaged
    checkpoint that is skipped.
    """
    if best:
        path = path / read_best_name(path)
    if (path / "config.json").exists():
        return load_hugging_face_model(path).eval(), load_tokenizer(str(path)), None
    if path.is_dir() and not is_parted(path):
        found = find_resumable(path, report)
        if found is None:
            raise CheckpointError(f"{describe_missing(path)} A Hugging Face folder should contain config.json.")
        path, state = found
    else:
        state = load_checkpoint(path)
    return *restore_model(state, path), state


def load_hugging_face_model(folder: Path) -> SmolLM2:
    """Return the model in a folder with config.json and model.safetensors, as one file or as shards with an index."""
    return build_model(read_hugging_face_config(folder), open_weights(folder), folder)


def restore_model(state: Mapping[str, Any], path: Path) -> tuple[SmolLM2, Tokenizer]:
    """Return the model, in evaluation mode and float32, and the tokenizer stored in a checkpoint's content.

    Raise CheckpointError if they do not fit the checkpoint's config.
    """
    config = read_config(state, path)
    model = build_model(config.model, state["model"], path)
    model.trained_length = config.training.sequence_length
    return model.eval(), restore_tokenizer(state)


def read_config(state: Mapping[str, Any], path: Path) -> Config:
    """Return the config of the run that made a checkpoint. Raise CheckpointError if this version does not accept it."""
    try:
        return Config.model_validate_json(state["config"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            path, f"its config is not accepted: {key}: {first['msg']}", "use the version that wrote it"
        ) from None


def read_best_name(folder: Path) -> str:
    """Return the file name in a run folder's best.json. Raise CheckpointError if best.json is missing or invalid."""
    path = folder / BEST
    if not path.exists():
        raise CheckpointError(path, "not found", "choose a run folder that has a best checkpoint, or omit --best")
    name = read_json(path).get("file")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(
            path,
            f"refers to {name!r}, which is not a checkpoint in this folder",
            "give the path of the checkpoint itself",
        )
    return name
