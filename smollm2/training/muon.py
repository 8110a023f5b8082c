"""The Muon optimizer: momentum with an orthogonalized update (arXiv 2502.16982), implemented once for all devices.

`torch.optim.Muon` casts to bf16 on every device and processes one matrix at a time. A CPU without bf16 units emulates
bf16 products at a hundredth of its float32 speed. Here the dtype is an argument, and matrices of equal shape are
stacked and multiplied in one batch. The comparison, with its figures, is in docs/decisions/0006-muon-of-our-own.md.

Letters in shapes: B is the number of matrices in a stack, M their shorter and N their longer side.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from smollm2.runtime.sharding import ALONE, Layout, local

COEFFICIENTS = (
    (8.0942, -22.3269, 15.7716),
    (3.9485, -2.7902, 0.5049),
    (3.4861, -2.5145, 0.4819),
    (2.5202, -1.8034, 0.4083),
)
"""(a, b, c) of each step X <- a X + b (X X^T) X + c (X X^T)^2 X, computed as in Polar Express (arXiv 2505.16932): each
is the best polynomial of its degree for the range of singular values that the previous step leaves. Four steps map
singular values between 0.003 and 1 to between 0.77 and 1.23. Each range is 2 % wider than needed, because bf16 rounds
and the polynomials explode outside their range."""

SMALLEST_NORM = 1e-7
"""A matrix with a smaller norm is divided by this instead, so that tiny noise is not scaled up to a full update."""

STACKED_NUMBERS = 2**25
"""The maximum number of elements in one stack, which bounds the temporary memory for large models."""


class Muon(Optimizer):
    """Orthogonalized Nesterov momentum with decoupled weight decay, for parameters with two dimensions.

    The update is scaled by 0.2 sqrt(max(rows, columns)) to match the root mean square of AdamW's updates (arXiv
    2502.16982, section 2.2), so that one learning rate and one weight decay suit both optimizers. The state of a
    parameter is its `momentum_buffer`, with the same meaning as in `torch.optim.Muon`.
    """

    # Version of the update rule, recorded in checkpoints. A checkpoint without it is from torch.optim.Muon, version 1.
    arithmetic = 2

    def __init__(
        self,
        params: Sequence[tuple[str, Tensor]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        layout: Layout = ALONE,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.layout = dtype, layout
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.ndim != 2:
                    raise ValueError(f"Muon updates matrices, and {name} has the shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` exists only to match torch's signature."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for stack in stack_by_shape(params) if self.layout.is_alone else share_by_shape(params):
                self._update(stack, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [local(p.grad) for p in params if p.grad is not None]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        weights = [local(p) for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        if self.layout.is_alone:
            weights = [lay_wide(weight) for weight in weights]
            stacked = torch.stack([lay_wide(direction) for direction in directions])
            orthogonal = list(orthogonalize(stacked, self.dtype).to(weights[0].dtype).unbind())
        else:
            orthogonal = self._orthogonalize_together(directions, params[0].shape)
        scale = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, orthogonal, alpha=-group["lr"] * scale)

    def _orthogonalize_together(self, parts: list[Tensor], shape: torch.Size) -> list[Tensor]:
        """Return this rank's rows of the orthogonalized matrices, each computed by one rank. `parts` are the same rows.

        Every replica takes the next of equal runs of matrices, and every shard of a replica the next run of those. It
        receives all rows of its matrices, returns the rows of the results, and the replicas exchange theirs.
        """
        layout, (rows, columns) = self.layout, shape
        height, each = -(-rows // layout.shards), -(-len(parts) // (layout.replicas * layout.shards))
        stacked = parts[0].new_zeros(layout.replicas, layout.shards * each, height, columns)
        for number, part in enumerate(parts):
            stacked.flatten(0, 1)[number, : len(part)] = part
        mine = exchange(stacked[layout.replica].contiguous(), layout.shard_group)
        mine = mine.view(layout.shards, each, height, columns).transpose(0, 1).flatten(1, 2)[:, :rows]
        wide = mine if rows <= columns else mine.mT
        found = orthogonalize(wide, self.dtype).to(parts[0].dtype)
        result = parts[0].new_zeros(each, layout.shards * height, columns)
        result[:, :rows] = found if rows <= columns else found.mT
        back = result.view(each, layout.shards, height, columns).transpose(0, 1).flatten(0, 1).contiguous()
        stacked[layout.replica] = exchange(back, layout.shard_group)
        if layout.replica_group:
            dist.all_gather(list(stacked.unbind()), stacked[layout.replica].clone(), group=layout.replica_group)
        return [one[: len(part)] for one, part in zip(stacked.flatten(0, 1), parts, strict=False)]


def exchange(parts: Tensor, group: Any) -> Tensor:
    """Send the i-th of equal runs of `parts` (N, ...) to the i-th rank of a group, and return those received, in order."""
    if group is None:
        return parts
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def share_by_shape(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the matrices of each shape, which ranks share out among themselves."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    yield from shapes.values()


def stack_by_shape(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield groups, of bounded size, of matrices with the same shorter and the same longer side."""
    stacks: dict[tuple[int, int], list[Tensor]] = {}
    for p in params:
        stacks.setdefault((min(p.shape), max(p.shape)), []).append(p)
    for (shorter, longer), alike in stacks.items():
        count = max(1, STACKED_NUMBERS // (shorter * longer))
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def lay_wide(matrix: Tensor) -> Tensor:
    """Return the matrix if it has at least as many columns as rows, else its transposed view."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices (B, M, N) in `dtype` with the singular vectors of `x` and singular values near 1.

    The Frobenius norm of X X^T bounds the square of the largest singular value more tightly than the square of X's norm
    does. The iteration therefore starts with larger singular values, which saves one of its steps.
    """
    x = x.to(dtype)
    gram = torch.bmm(x, x.mT)
    square = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(SMALLEST_NORM**2)
    gram, x = gram / square, x * square.rsqrt()
    # The Gram matrix squares the singular values, and bf16 is too coarse for the squares of the small ones.
    if dtype == torch.float32 and x.shape[1] < x.shape[2]:
        return torch.bmm(iterate_on_gram(gram), x)
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        gram = torch.bmm(x, x.mT) if number else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterate_on_gram(gram: Tensor) -> Tensor:
    """Return the product (B, M, M) of every step's polynomial in X X^T, so that the longer X is multiplied only once.

    Polynomials in one symmetric matrix commute: with P = a + b G + c G^2, the next Gram matrix is P G P.
    """
    product = gram
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = torch.bmm(polynomial, product) if number else polynomial
        if number < len(COEFFICIENTS) - 1:
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    return product
