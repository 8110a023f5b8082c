"""Open a trained model: a `.pt` of ours, a run folder, or a Hugging Face folder (Llama, or StableLM for LayerNorm).

The parameter names are Hugging Face's, so that a folder is read as it is. What the config of a folder asks for and this
model does not compute is refused by name, never ignored.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from smollm2.checkpoint.discovery import describe_missing, find_resumable, load_checkpoint
from smollm2.config.schema import Config
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text
from smollm2.errors import CheckpointError
from smollm2.inference.hugging_face_folder import load_hugging_face_model
from smollm2.inference.weights import build_model, read_json
from smollm2.model.transformer import SmolLM2


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[SmolLM2, Tokenizer]:
    """The model, in evaluation mode and float32, and its tokenizer: of a `.pt`, of a run folder's newest valid checkpoint
    or of a Hugging Face folder. Raises CheckpointError or DataError."""
    model, tokenizer, _ = load_source(Path(path))
    return model.to(device), tokenizer


def load_source(
    path: Path, *, best: bool = False, say: Callable[[str], None] = lambda message: None
) -> tuple[SmolLM2, Tokenizer, Mapping[str, Any] | None]:
    """As `load_model` on the CPU, and the checkpoint's content, which a Hugging Face folder has not.

    With `best` a run folder's checkpoint with the lowest validation loss. `say` hears of checkpoints that are passed over.
    """
    if best:
        path = path / read_best_name(path)
    if (path / "config.json").exists():
        return load_hugging_face_model(path).eval(), load_tokenizer(str(path)), None
    if path.is_dir():
        found = find_resumable(path, say)
        if found is None:
            raise CheckpointError(f"{describe_missing(path)} A Hugging Face folder would hold config.json.")
        path, state = found
    else:
        state = load_checkpoint(path)
    return *restore_model(state, path), state


def restore_model(state: Mapping[str, Any], path: Path) -> tuple[SmolLM2, Tokenizer]:
    """The model, in evaluation mode and float32, and the tokenizer of a checkpoint's content. Raises CheckpointError."""
    model = build_model(read_config(state, path).model, state["model"], path)
    tokenizer = state["tokenizer"]
    return model.eval(), tokenizer_from_text(tokenizer["text"], tokenizer["end_of_text"])


def read_config(state: Mapping[str, Any], path: Path) -> Config:
    """The config of the run that made a checkpoint. Raises CheckpointError where this version does not understand it."""
    try:
        return Config.model_validate_json(state["config"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: its config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_best_name(folder: Path) -> str:
    """The file that a run folder's best.json names. Raises CheckpointError."""
    path = folder / "best.json"
    if not path.exists():
        raise CheckpointError(f"{path} - there is no such file - name a run folder that has one, or leave out --best")
    name = read_json(path).get("file")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path} - it names no checkpoint of this folder - name the checkpoint yourself")
    return name
