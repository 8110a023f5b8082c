"""The contents of a checkpoint `step_XXXX.pt`: a dictionary of plain values and tensors; ENTRIES lists its entries."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from smollm2.errors import CheckpointError

FORMAT = "smollm2-train/1"
State = dict[str, Any]

ENTRIES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "step": (int,),
    "tokens": (int,),
    "loss": (float,),
    "model": (dict,),
    "tied": (list,),
    "optimizer": (dict,),
    "scheduler": (dict,),
    "scheduler.step": (int,),
    "scheduler.learning_rate": (float,),
    "scaler": (dict,),
    "data": (dict,),
    "data.seed": (int,),
    "data.epoch": (int,),
    "data.next_batch": (int,),
    "data.order_version": (int, str),
    "data.tokens_fingerprint": (str,),
    "data.tokens": (int,),
    "data.windows": (int,),
    "rng": (dict,),
    "rng.torch": (Tensor,),
    "rng.cuda": (list,),
    "rng.python": (tuple,),
    "rng.numpy": (dict,),
    "stability": (dict,),
    "stability.skipped": (list,),
    "stability.losses": (list,),
    "stability.spikes": (list,),
    "stability.pending": (list,),
    "stability.best_validation_loss": (float,),
    "best": (dict,),
    "config": (str,),
    "tokenizer": (dict,),
    "tokenizer.text": (str,),
    "tokenizer.fingerprint": (str,),
    "tokenizer.vocab_size": (int,),
    "tokenizer.end_of_text": (int,),
    "env": (dict,),
    "wandb_run_id": (str,),
    "created_unix": (int, float),
}
"""The entries of every checkpoint by dotted name, and their types. `tied` is added when saving and removed when
loading: it lists pairs of names in `model` that share one tensor, which is stored once, under the second name."""

LATER_ENTRIES: dict[str, tuple[type, ...]] = {
    "stability.clipped": (list,),
    "stability.norms": (list,),
    "stability.rates": (list,),
    "stability.skips": (list,),
    "optimizer.muon.arithmetic": (int,),
    "tokenizer.files": (dict,),
}
"""Optional entries: older checkpoints of this format lack them, and no weight depends on them. If present, they must
have these types."""

SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype)
MAX_DEPTH = 16


def take_snapshot(state: State, buffers: dict[str, Tensor]) -> State:
    """Return a copy of the state in host memory, which `save_checkpoint` can write while training continues.

    `buffers` keeps the copied tensors, so that the next snapshot can reuse them: allocating new memory costs ten times
    as much as copying. Raise TypeError, a bug in the caller, if the state is not made of plain values.
    """
    model, tied = separate_ties(state["model"])
    with copy_to_host(buffers) as copy:
        content: State = to_plain({**state, "model": model, "tied": tied}, "state", copy)
    return content


@contextlib.contextmanager
def copy_to_host(buffers: dict[str, Tensor]) -> Iterator[Callable[[Tensor, str], Tensor]]:
    """Yield a function that copies a tensor to a named buffer in host memory; the copies are complete on exit."""

    def copy(tensor: Tensor, name: str) -> Tensor:
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    yield copy
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies from the device are asynchronous


def content_hash(state: Mapping[str, Any]) -> str:
    """Return an order-independent hash of a state's values and tensors: equal hashes mean bit-identical states."""
    digest = hashlib.sha256()
    for name, value in sorted(walk(to_plain(state, "state")), key=lambda leaf: leaf[0]):
        if isinstance(value, Tensor):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name}|{value!r}|".encode())
    return digest.hexdigest()


def walk(state: object) -> Iterator[tuple[str, object]]:
    """Yield the dotted name and value of every entry that is not a container.

    It is not recursive, because a file may contain 100,000 nested levels. Raise CheckpointError for a container that is
    nested too deeply or occurs twice: one that contains itself would never end.
    """
    waiting: list[tuple[str, object, int]] = [("", state, 0)]
    seen: set[int] = set()
    while waiting:
        name, value, depth = waiting.pop()
        if not isinstance(value, dict | list | tuple):
            yield name, value
            continue
        if depth > MAX_DEPTH or (value and id(value) in seen):
            raise CheckpointError(f"{name[:80]!r} is nested too deeply, or contains itself")
        seen.add(id(value))
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if type(key) not in (str, int):
                raise CheckpointError(f"{name[:80]!r} has a key of type {type(key).__name__}, which is not allowed")
            waiting.append((f"{name}.{key}" if name else str(key), child, depth + 1))


def to_plain(value: Any, name: str, to_host: Callable[[Tensor, str], Tensor] = lambda tensor, _: tensor.cpu()) -> Any:
    """Return a copy of `value` with plain containers and CPU tensors.

    Raise TypeError, which names the value, if a checkpoint cannot store it.
    """
    if isinstance(value, Tensor):
        return _own_storage(to_host(value.detach(), name), name)
    if isinstance(value, Mapping):
        wrong = next((key for key in value if type(key) not in (str, int)), None)
        if wrong is not None:
            raise TypeError(f"{name} has the key {wrong!r}, a {type(wrong).__name__}")
        return {key: to_plain(child, f"{name}.{key}", to_host) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(child, f"{name}.{number}", to_host) for number, child in enumerate(value))
    if type(value) not in SCALARS:
        # weights_only rejects a file with a numpy number, though such a number otherwise behaves like a Python one.
        raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; convert it first")
    return value


def _own_storage(host: Tensor, name: str) -> Tensor:
    """Return the tensor with its own storage: saving a view would save the entire storage behind it."""
    host = host.contiguous()
    if type(host) is not Tensor:
        raise TypeError(f"{name} is a {type(host).__name__}, which a checkpoint cannot hold; gather it first")
    return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()


def separate_ties(model: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Return the model's tensors, each tied one only once, and the ties as [other name, kept name] pairs.

    Call it before the tensors are copied: copies no longer share memory.
    """
    kept: dict[str, Tensor] = {}
    tied: list[list[str]] = []
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in model.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = names.setdefault(place, name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor
        else:
            tied.append([name, first])
    return kept, tied


def estimate_size(content: State) -> int:
    """Return an upper estimate of the file size in bytes: tensors, strings, their record headers, and a 2 % margin."""
    total = 1 << 16
    for name, value in walk(content):
        total += len(name) + 64
        if isinstance(value, Tensor):
            total += value.nbytes + 512
        elif isinstance(value, str | bytes):
            total += 4 * len(value)
    return int(total * 1.02)
