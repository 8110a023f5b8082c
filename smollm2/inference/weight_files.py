"""The tensors of a folder's safetensors files: one file, or shards with an index. Each is read when it is asked for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smollm2.config.model_folder import DOWNLOAD, read_json, refuse_pointer
from smollm2.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights by their names in the file."""


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name. `shapes` and `dtypes` are known without reading a tensor.

    Raise CheckpointError if a file is missing or invalid.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        if not path.exists():
            other = sorted(found.name for found in path.parent.glob("pytorch_model*.bin"))
            what = f"not found; {other[0]} is not read, because opening it may run code" if other else "not found"
            raise CheckpointError(path, what, CONVERT if other else DOWNLOAD)
        refuse_pointer(path)
        try:
            file = safe_open(path, "pt")
            for name in list_names(file):
                view = file.get_slice(name)  # type: ignore[no-untyped-call]
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = DTYPES.get(view.get_dtype()) or file.get_tensor(name).dtype  # type: ignore[no-untyped-call]
                self._files[name] = file
        except (OSError, SafetensorError) as error:
            what = f"is incomplete, or is not a safetensors file ({error})"
            raise CheckpointError(path, what, DOWNLOAD) from None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def list_names(file: Any) -> list[str]:
    """Return the names of the tensors in an open safetensors file."""
    return list(file.keys())


CONVERT = "convert the folder to safetensors, in an environment that you trust: " + (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER').save_pretrained('NEW')\""
)


def open_weights(folder: Path) -> WeightFiles:
    """Return the tensors of a model folder. Raise CheckpointError if a file is missing or invalid."""
    index = folder / "model.safetensors.index.json"
    names = read_shard_names(index) if index.exists() else ["model.safetensors"]
    return WeightFiles([folder / name for name in names])


def read_shard_names(index: Path) -> list[str]:
    """Return the names of the shards in an index. Raise CheckpointError if the index is invalid."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(index, "weight_map is missing or does not consist of file names", DOWNLOAD)
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(index, f"shard {name!r} is outside the folder", "use a folder that you trust")
    return names
