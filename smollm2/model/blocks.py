"""Causal attention as matrix products over blocks of queries, for bf16 on CPUs, where torch's own kernel is slow.

Shapes use the letters of attention.py; G = H / K is the number of query heads that share a key-value head.
"""

import math

import torch
from torch import Tensor

from smollm2.plan.arithmetic import LONGEST_KEPT, QUERY_BLOCK


class BlockAttention(torch.autograd.Function):
    """Attention of each block of queries over the keys up to its end, computed with `baddbmm`, softmax and `bmm`.

    The queries that share a key-value head become rows of one matrix, so grouped heads need only one product. For short
    sequences, the probabilities are saved for the backward pass. For longer ones they would be the largest tensor, so
    they are recomputed. `starts` (B, T) is the first position of each position's document, or None.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        """Return the attention output (B, H, T, D), stored in memory as (B, T, H, D)."""
        batch, heads, length, width = q.shape
        groups = heads // k.shape[1]
        queries = q.reshape(-1, groups, length, width)
        keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
        out = q.new_empty(batch, length, heads, width)
        by_group = out.view(batch, length, -1, groups, width).permute(0, 2, 3, 1, 4)  # B K G T D
        kept = []
        for start, stop in _cut(length):
            first = _first_key(starts, start)
            probabilities = _probabilities(queries, keys, first, start, stop, starts)
            mixed = torch.bmm(probabilities, values[:, first:stop])
            by_group[:, :, :, start:stop] = mixed.view(batch, -1, groups, stop - start, width)
            if length <= LONGEST_KEPT:
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, starts, *kept)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        """Return the gradients of q, k and v; for scores S and probabilities P, dS = P * (dP - rowsum(P * dP))."""
        queries, keys, values, starts, *kept = ctx.saved_tensors
        batch, _, length, width = grad.shape
        scale, groups = width**-0.5, queries.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for start, stop in reversed(_cut(length)):
            first = _first_key(starts, start)
            probabilities = kept.pop() if kept else _probabilities(queries, keys, first, start, stop, starts)
            upstream = grad[:, :, start:stop].reshape(len(queries), -1, width)
            grad_v[:, first:stop].baddbmm_(probabilities.transpose(1, 2), upstream)
            grad_p = torch.bmm(upstream, values[:, first:stop].transpose(1, 2))
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
            mixed = torch.baddbmm(grad_q.new_zeros(()), grad_s, keys[:, first:stop], beta=0, alpha=scale)
            grad_q[:, :, start:stop] = mixed.view(-1, groups, stop - start, width)
            grad_k[:, first:stop].baddbmm_(grad_s.transpose(1, 2), _rows(queries, start, stop), alpha=scale)
        heads = (batch, -1, length, width)
        return grad_q.view(heads), grad_k.view(heads), grad_v.view(heads), None


def _cut(length: int) -> list[tuple[int, int]]:
    """Return the start and end of each block of queries."""
    size = QUERY_BLOCK if length <= 1024 else 2 * QUERY_BLOCK
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _rows(queries: Tensor, start: int, stop: int) -> Tensor:
    """Return positions start..stop of (B K, G, T, D), with the heads of a group as rows: (B K, G (stop - start), D)."""
    return queries[:, :, start:stop].reshape(len(queries), -1, queries.shape[-1])


def _first_key(starts: Tensor | None, start: int) -> int:
    """Return the first key that the queries from `start` on need, rounded down to a multiple of the block size.

    Rounding keeps the number of shapes small, because oneDNN compiles a kernel for each shape. Compiled code reads all
    keys, because the values of `starts` are unknown at compile time.
    """
    if starts is None or torch.compiler.is_compiling():
        return 0
    return int(starts[:, start].min()) // QUERY_BLOCK * QUERY_BLOCK


def _probabilities(queries: Tensor, keys: Tensor, first: int, start: int, stop: int, starts: Tensor | None) -> Tensor:
    """Return the attention probabilities over keys `first` to `stop`: (B K, G (stop - start), stop - first)."""
    groups, count = queries.shape[1], stop - first
    future = torch.ones(stop - start, count, dtype=torch.bool, device=keys.device).triu(start - first + 1)
    mask = torch.zeros(stop - start, count, dtype=keys.dtype, device=keys.device).masked_fill_(future, -math.inf)
    mask, rows = mask.repeat(groups, 1).unsqueeze(0), _rows(queries, start, stop)
    scores = torch.baddbmm(mask, rows, keys[:, first:stop].transpose(1, 2), alpha=keys.shape[-1] ** -0.5)
    if starts is not None:
        other_document = torch.arange(first, stop, device=keys.device) < starts[:, start:stop, None]
        scores.view(len(starts), -1, stop - start, count).masked_fill_(other_document.unsqueeze(1), -math.inf)
    return scores.softmax(-1)
