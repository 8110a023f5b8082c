"""Read a checkpoint that is a folder (parts.py), as untrusted files: of any number of ranks, by one process."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from smollm2.checkpoint.format import State
from smollm2.checkpoint.parts import METADATA, MODEL, OPTIMIZER, SKELETON, describe_file, without_a_warning
from smollm2.checkpoint.validation import find_wrong_weight, read_checked
from smollm2.errors import CheckpointError, Smollm2Error
from smollm2.storage.run_folder import MANIFEST


def read_parts(path: Path) -> State:
    """Return the state in a folder, with whole tensors in memory. Nothing in it is interpreted before its hash matches.

    Raise CheckpointError, whose message is only the reason, if it is not a complete, undamaged checkpoint.
    """
    try:
        manifest = read_manifest(path)
        state = read_checked(path / SKELETON)
        metadata = read_metadata(path / METADATA, manifest)
        wholes = {name: allocate(name, one) for name, one in metadata.state_dict_metadata.items()}
        reader = filesystem.FileSystemReader(path)
        reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign]
        place_tensors(state, wholes)
        with without_a_warning():
            load(dict(wholes), storage_reader=reader, no_dist=True)
        if problem := find_wrong_weight(state["model"]):
            raise CheckpointError(problem)
    except Smollm2Error:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})") from None
    except (Exception, CheckpointException) as error:  # given arbitrary bytes, almost any exception is possible
        raise CheckpointError(f"is damaged, or is not a checkpoint of this program ({type(error).__name__})") from None
    for alias, kept in state.pop("tied_parts", []):
        state["model"][alias] = state["model"][kept]
    return state


def place_tensors(state: State, wholes: Mapping[str, Tensor]) -> None:
    """Put the tensors into their places in the state. Raise CheckpointError if one has none."""
    for name, tensor in wholes.items():
        kind, *places = name.split("/")
        if kind == MODEL and len(places) == 1:
            state["model"][places[0]] = tensor
        elif kind == OPTIMIZER and len(places) == 3 and places[0] in state["optimizer"] and places[1].isdecimal():
            moments = state["optimizer"][places[0]]["state"].setdefault("state", {})
            moments.setdefault(int(places[1]), {})[places[2]] = tensor
        else:
            raise CheckpointError(f"has a tensor without a place: {name[:80]!r}")


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return the files listed in the manifest, after comparing each with its size and hash. Raise CheckpointError."""
    try:
        found = json.loads((path / MANIFEST).read_bytes())
        files = {str(name): (int(one["size"]), str(one["sha256"])) for name, one in found["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"has no {MANIFEST}: it is incomplete, or not a checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"has a damaged {MANIFEST}") from None
    if not {SKELETON, METADATA} <= files.keys() or any(Path(name).name != name for name in files):
        raise CheckpointError(f"has a {MANIFEST} that does not list the files of a checkpoint")
    for name, wanted in files.items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise CheckpointError(f"lacks {name}")
        if describe_file(file) != wanted:
            raise CheckpointError(f"is damaged: {name} does not match its hash")
    if extra := sorted({p.name for p in path.glob("*.distcp")} - files.keys()):
        raise CheckpointError(f"contains {extra[0]}, which belongs to another checkpoint")
    listed: dict[str, dict[str, Any]] = found["files"]
    return listed


ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "TensorProperties")
}
ALLOWED |= {("torch.distributed.checkpoint.metadata", name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")}
ALLOWED |= {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
ALLOWED |= {("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64")}
"""The classes that the pickle in `.metadata` may name: plain records of DCP."""


class MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's metadata without being able to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class. Raise CheckpointError for any other."""
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"has metadata that would run code ({module[:40]}.{name[:40]})")
        return super().find_class(module, name)


def read_metadata(path: Path, manifest: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """Return the metadata, whose tensors must fit into the files of the manifest. Raise CheckpointError."""
    with path.open("rb") as file:
        found: Metadata = MetadataUnpickler(file).load()
    tensors = [one for one in found.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
    if len(tensors) < len(found.state_dict_metadata):
        raise CheckpointError("has metadata of something other than tensors")
    wanted = sum(int(one.size.numel()) * one.properties.dtype.itemsize for one in tensors)
    if wanted > sum(one["size"] for one in manifest.values()):
        raise CheckpointError(f"has metadata of {wanted:,} bytes, which are more than its files hold")
    places = {one.relative_path for one in (found.storage_data or {}).values()}
    if not places <= manifest.keys():
        raise CheckpointError("has metadata that leads to other files")
    return found


def allocate(name: str, metadata: Any) -> Tensor:
    """Return an empty tensor for what the chunks of one fill completely. Raise CheckpointError if they do not."""
    if sum(chunk.sizes.numel() for chunk in metadata.chunks) != metadata.size.numel():
        raise CheckpointError(f"lacks a part of {name[:80]!r}")
    return torch.empty(metadata.size, dtype=metadata.properties.dtype)
