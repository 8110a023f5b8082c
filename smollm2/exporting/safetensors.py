"""Weights as safetensors: a length, a JSON header, the bytes. Written a tensor at a time, so that no copy is held.

The library's own writer wants the whole file in memory or a name of its own; here every byte goes through files.py, which
claims the room first and syncs. What was written is read back by the library.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from smollm2.storage.atomic import IO_OPS, IoOps, Target, write_atomically

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int, io_ops: IoOps = IO_OPS
) -> None:
    """model.safetensors, or shards of up to `shard_bytes` with an index where the weights are larger."""
    shards = list(cut_shards(weights, dtype, shard_bytes))
    if len(shards) == 1:
        write_file(folder / "model.safetensors", weights, dtype, io_ops)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: weights[name] for name in names}, dtype, io_ops)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": count_bytes(weights, dtype)}, "weight_map": places}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode(), io_ops=io_ops)


def cut_shards(weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    """The names in order, a new list where the next tensor would not fit; a larger tensor stands alone."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        more = tensor.numel() * dtype.itemsize
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def count_bytes(weights: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """What the weights take in a dtype."""
    return sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize


def write_file(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, io_ops: IoOps = IO_OPS) -> None:
    """One safetensors file. Raises ResourceError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, tensor in weights.items():
        end = offset + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Target) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            data = tensor.detach().cpu().to(dtype).contiguous().flatten().view(torch.uint8)
            file.write(data.numpy().data)

    write_atomically(path, write, size=8 + len(text) + offset, io_ops=io_ops)
