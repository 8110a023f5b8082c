"""Checkpoints as folders: `step_XXXX/`, to which each rank writes its part of the weights and moments.

torch's distributed checkpoint (DCP) writes and reads the tensors, in files `__RANK_0.distcp`, and knows from `.metadata`
which rows are where. `state.pt` holds the rest. `manifest.json`, written last, has the size and the SHA-256 of each
file. The folder gets its name once all of this is on disk, so it is there completely or not at all.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Size, Tensor
from torch import distributed as dist

from smollm2.checkpoint.format import State, copy_to_host, to_plain
from smollm2.model.transformer import EMBEDDING, HEAD
from smollm2.runtime.sharding import is_part, local

SKELETON, METADATA = "state.pt", ".metadata"
MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class Part:
    """Rows of a tensor in host memory: `tensor` begins at `offsets` in a whole of `size`.

    DCP calls the method; importing DCP takes half a second, which a run without such checkpoints need not spend.
    """

    tensor: Tensor
    offsets: tuple[int, ...]
    size: tuple[int, ...]

    def __create_write_items__(self, name: str, part: object) -> list[Any]:
        """Return what this rank has to write, as WriteItems."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if not self.tensor.numel():
            return []
        chunk = ChunkStorageMetadata(Size(self.offsets), self.tensor.size())
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.tensor), Size(self.size))
        return [WriteItem(MetadataIndex(name, self.offsets), WriteItemType.SHARD, tensor_data=data)]


@dataclass(frozen=True)
class PartedState:
    """A run's state on one rank: `parts` by name, and everything else, which only rank 0 writes."""

    skeleton: State
    parts: Mapping[str, Part]
    group: Any = None  # a gloo group of all ranks; None: one process

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank(self.group) if self.group else 0

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value."""
        if not self.group:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def copy(self, buffers: dict[str, Tensor]) -> "PartedState":
        """Return a copy in host memory; `buffers` keeps the copied tensors for the next one."""
        with copy_to_host(buffers) as copy:
            parts = {name: replace(part, tensor=copy(part.tensor, name)) for name, part in self.parts.items()}
        return replace(self, skeleton=to_plain(self.skeleton, "state", lambda tensor, _: tensor.clone()), parts=parts)


def divide_state(state: State, *, tied: bool, group: Any = None) -> PartedState:
    """Return the state as this rank's parts and the rest. `tied` says that the output head is the embedding."""
    model = {name: tensor for name, tensor in state["model"].items() if not (tied and name == HEAD)}
    parts = {f"{MODEL}/{name}": find_part(tensor) for name, tensor in model.items()}
    optimizers: dict[str, Any] = {}
    for name, optimizer in state["optimizer"].items():
        moments: dict[int, dict[str, Any]] = {}
        for index, values in optimizer["state"]["state"].items():
            large = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.ndim}
            parts |= {f"{OPTIMIZER}/{name}/{index}/{key}": find_part(value) for key, value in large.items()}
            moments[index] = {key: value for key, value in values.items() if key not in large}
        optimizers[name] = {**optimizer, "state": {**optimizer["state"], "state": moments}}
    skeleton = {**state, "model": {}, "optimizer": optimizers, "tied": []}
    skeleton = to_plain({**skeleton, "tied_parts": [[HEAD, EMBEDDING]] if tied else []}, "state")
    return PartedState(skeleton, parts, group)


def find_part(tensor: Tensor) -> Part:
    """Return this rank's part of a tensor; the whole of it if it is not a DTensor."""
    rows = local(tensor).detach()
    offsets = (0,) * tensor.ndim
    if is_part(tensor) and rows.numel():
        offsets = tuple(cast(Any, tensor).__create_chunk_list__()[0].offsets)
    return Part(rows, offsets, tuple(tensor.shape))


def describe_file(path: Path) -> tuple[int, str]:
    """Return the size and the SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def without_a_warning() -> Iterator[None]:
    """Silence DCP, which warns if one process saves or loads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
