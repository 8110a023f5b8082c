"""Shared-out training (FSDP2): each device holds a part of the weights, gradients and optimizer state.

torch's `fully_shard` is applied from outside, to each block and then to the rest of the model. Accelerate's own FSDP
plugin is not used, because it ignores a CPU. A parameter keeps its name and becomes a DTensor, split by rows.

torch's modules for this take a second to import, so only the functions that share a model out import them. A DTensor is
recognized by its mesh.
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from smollm2.model.transformer import EMBEDDING, HEAD, SmolLM2

SECONDS_TO_MEET = 30


@dataclass(frozen=True)
class Layout:
    """How a run's ranks share the model: `replicas` groups of ranks hold it, each split into `shards` parts.

    One process is 1 x 1, replicated training (DDP) is N x 1, `full` is 1 x N and `hybrid` is M machines x N devices.
    A group is None if it has one rank.
    """

    replicas: int = 1
    shards: int = 1
    mesh: Any = None  # a DeviceMesh, only if the model is shared out
    replica_group: Any = None
    shard_group: Any = None
    meeting_group: Any = None

    @property
    def name(self) -> str:
        """The layout in words, such as `none` or `2 x 4`."""
        return f"{self.replicas} x {self.shards}" if self.is_sharded else "none"

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are DTensors."""
        return self.mesh is not None

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank."""
        return self.replicas * self.shards == 1

    def all_meet(self) -> bool:
        """Return whether every rank calls this within SECONDS_TO_MEET of one another. If not, the run must end."""
        try:
            if self.meeting_group:
                dist.barrier(self.meeting_group)
        except RuntimeError:  # the group's timeout
            return False
        return True

    @property
    def replica(self) -> int:
        """The group of ranks, from 0 to `replicas` - 1, to which this rank belongs."""
        return dist.get_rank(self.replica_group) if self.replica_group else 0

    def combine_norms(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the norms (N,) of whole tensors from those of this rank's parts. A collective, as the next two."""
        stacked = torch.stack(list(norms))
        return self.combine_sums(stacked.square()).sqrt() if self.shard_group else stacked

    def combine_sums(self, values: Tensor) -> Tensor:
        """Return the sums of `values` over the parts."""
        if self.shard_group:
            dist.all_reduce(values, group=self.shard_group)
        return values

    def combine_extremes(self, extremes: Tensor) -> Tensor:
        """Return the (minimum, maximum) pairs (N, 2) of whole tensors; NaN and infinity stay what they are."""
        if self.shard_group:
            lowest, highest = extremes.unbind(1)
            extremes = torch.stack((-lowest, highest), 1)
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.shard_group)
            extremes = extremes * torch.tensor([-1.0, 1.0], device=extremes.device)
        return extremes


ALONE = Layout()
"""One process."""


def make_layout(sharding: str, device: torch.device, world_size: int, machines: int) -> Layout:
    """Return the layout of `none`, `full` or `hybrid`; all ranks must call this together."""
    if sharding == "none":
        return Layout(world_size, 1, replica_group=dist.group.WORLD if world_size > 1 else None)
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():  # one process: FSDP needs a process group all the same
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    replicas = machines if sharding == "hybrid" else 1
    shape, names = ((replicas, world_size // replicas), ("replica", "shard"))
    if replicas == 1:
        shape, names = shape[1:], names[1:]  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    groups = {name: mesh.get_group(name) for name, size in zip(names, shape, strict=True) if size > 1}
    meeting = None
    if world_size > 1:
        meeting = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=SECONDS_TO_MEET))
    return Layout(replicas, shape[-1], mesh, groups.get("replica"), groups.get("shard"), meeting)


def share_out(model: SmolLM2, layout: Layout, dtype: torch.dtype) -> None:
    """Split the model's parameters over the ranks, in place and block by block, and move them to the mesh's device.

    Weights are gathered in `dtype` if it has 16 bits, and freed after each pass of a block; gradients are summed in float32.
    """
    if layout.mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype.itemsize == 2 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay in float32
    )
    options: dict[str, Any] = {"mesh": layout.mesh, "mp_policy": policy}
    for block in model.model.layers:
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(model, reshard_after_forward=False, **options)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Give this rank the whole model inside the `with` block, as plain tensors. All ranks must enter and leave together."""
    parts: list[Any] = [module for module in model.modules() if is_shared_out(module)]
    blocks = parts[1:]
    with torch.no_grad():
        for part in parts:
            part.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        end_passes(model)
        for part in parts:
            part.reshard()


def is_shared_out(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to a module."""
    return hasattr(module, "unshard")


def is_part(value: object) -> bool:
    """Return whether a value is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def free_gathered(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass leaves gathered."""
    if is_shared_out(model):
        end_passes(model)
        cast(Any, model).reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; the tensor itself if it is not a DTensor."""
    return cast(Any, tensor).to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. For a DTensor this is a collective, which every rank must call."""
    return cast(Any, tensor).full_tensor() if is_part(tensor) else tensor


def lay_out_like(full: Tensor, like: Tensor) -> Tensor:
    """Return `full`, which every rank has, split as `like` is; without communication."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    part = cast(Any, like)
    return distribute_tensor(full.to(like.device), part.device_mesh, part.placements, src_data_rank=None)


def gather_state(state: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return a run's state with whole tensors in host memory on rank 0, and an empty one on the other ranks.

    If the model is shared out, this is a collective. `tied` says that the output head is the embedding.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0

    def gather(value: Any) -> Any:
        if is_part(value):
            full = whole(value)
            return full.cpu() if is_first else None
        if isinstance(value, dict):
            return {key: gather(child) for key, child in value.items()}
        return value

    if not any(map(is_part, state["model"].values())):
        return state
    model = dict(state["model"])
    head = model.pop(HEAD) if tied else None
    found: dict[str, Any] = gather({**state, "model": model})
    if head is not None:
        found["model"][HEAD] = found["model"][EMBEDDING]
    return found if is_first else {}


def recover(model: nn.Module) -> None:
    """Drop all gradients; make a shared-out model usable after an error at the same place of a pass on every rank.

    An error drops the end of the backward pass, which autograd had planned. It is a collective.
    """
    end_passes(model)
    model.zero_grad(set_to_none=True)


def end_passes(model: nn.Module) -> None:
    """Do what FSDP does at the end of a backward pass, after passes that have none; torch has no public name for it.

    FSDP sums what gradients there are, frees the gathered weights and forgets the order of the forward passes. By that
    order a backward pass gathers weights ahead of their use: if it had the passes of one rank alone, as of a sample, the
    ranks would gather different weights and wait for one another.
    """
    if is_shared_out(model):
        cast(Any, model)._get_fsdp_state()._root_post_backward_final_callback()
