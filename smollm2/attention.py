"""Causal attention: softmax(q k^T / sqrt(D)) v, each position over itself and those before it.

Shapes: q (B, H, T, D), k and v (B, K, T, D) with K dividing H; query head h reads key-value head h // (H / K). Three
backends compute the same function: `sdpa` (torch's flash kernels), `blocks` (matrix products over blocks of queries,
for CPUs in bf16, where torch's kernel is slow) and `eager` (the definition, the reference of the tests). A backend is
used only after `check_backend` saw it agree with the reference.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["sdpa", "blocks", "eager"]

BLOCK = 256
"""Query rows of one block: 128 to 512 were level within 5 % on two cores with avx512_bf16 (2026-11-24)."""


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    """Attention output (B, H, T, D) in the dtype of `v`."""
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    if backend == "blocks":
        out: Tensor = BlockAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out
    return eager_attention(q, k, v)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, with the softmax in float32 and the whole (T, T) score matrix in memory."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    probabilities: Tensor = scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype)
    return probabilities @ v


COLUMN_STEP = 64
"""Columns of a cache are made, and looked at, in multiples of this. None that is empty costs much, and the shapes stay few:
for each new one oneDNN compiles its kernels anew, 0.4 s in bf16."""


class Slot(NamedTuple):
    """One layer's place in a cache: keys and values (B, K, S, D), the first column to write, and the mask (B, 1, T, S)
    to be added to the scores of the T queries."""

    keys: Tensor
    values: Tensor
    column: int
    mask: Tensor


def attend_cached(q: Tensor, k: Tensor, v: Tensor, slot: Slot) -> Tensor:
    """Write k and v behind those in the cache, then attend over all of it: (B, H, T, D).

    The queries of one key-value head are laid under one another: no key is copied for grouped heads.
    """
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    written = slice(slot.column, slot.column + length)
    slot.keys[:, :, written] = k
    slot.values[:, :, written] = v
    rows = q.reshape(*k.shape[:2], groups * length, q.shape[3])
    mask = slot.mask.repeat(1, 1, groups, 1) if length > 1 else slot.mask
    return F.scaled_dot_product_attention(rows, slot.keys, slot.values, attn_mask=mask).view(q.shape)


class KeyValueCache:
    """Keys and values of a batch of texts that end at the same column; `starts` (B,) are the columns where they begin.

    `buffer_shape` is (layers, B, K, S, D); the buffers are made once.
    """

    def __init__(self, starts: Tensor, buffer_shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
        self.starts, self.length = starts.unsqueeze(1), 0
        # Zeros: a column that is masked counts 0 times its value, which must be a number.
        self.keys, self.values = torch.zeros(2, *buffer_shape, dtype=dtype, device=starts.device)
        self.columns = torch.arange(buffer_shape[3], device=starts.device)
        self.mask = torch.full((buffer_shape[1], 1, 1, buffer_shape[3]), -math.inf, dtype=dtype, device=starts.device)

    @property
    def is_full(self) -> bool:
        """Whether no column is left, as where a text that has ended was the longest."""
        return self.length == len(self.columns)

    def advance(self, count: int) -> tuple[Tensor, list[Slot]]:
        """Positions (B, T) of the next `count` columns in their texts, and where each layer writes them."""
        first, self.length = self.length, self.length + count
        new = self.columns[first : self.length]
        mask = self._open_column(first) if count == 1 and first else self._open_columns(new)
        seen = min(-(-self.length // COLUMN_STEP) * COLUMN_STEP, len(self.columns))
        keys, values, mask = self.keys[..., :seen, :], self.values[..., :seen, :], mask[..., :seen]
        slots = [Slot(*layer, first, mask) for layer in zip(keys, values, strict=True)]
        return (new - self.starts).clamp(min=0), slots

    def _open_column(self, column: int) -> Tensor:
        self.mask[..., column] = 0
        return self.mask

    def _open_columns(self, new: Tensor) -> Tensor:
        """Each column sees itself and those of its text before it. One of the padding sees itself: none would be NaN."""
        inside = (self.columns >= self.starts)[:, None, None]
        seen = (self.columns <= new[:, None]) & inside | (self.columns == new[:, None])
        mask = torch.zeros_like(seen, dtype=self.mask.dtype).masked_fill_(~seen, -math.inf)
        self.mask = mask[:, :, -1:].clone()
        return mask


class BlockAttention(torch.autograd.Function):
    """Query blocks against the keys up to their end, by `baddbmm`, softmax and `bmm`; probabilities are recomputed.

    The queries of one key-value head are laid under one another, so that grouped heads share a product. Only q, k and
    v are kept for the backward pass: the probabilities would cost H x T^2 / 2 numbers a layer.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Output (B, H, T, D)."""
        ctx.save_for_backward(q, k, v)
        batch, heads, length, width = q.shape
        groups = heads // k.shape[1]
        keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
        out = q.new_empty(batch * k.shape[1], groups, length, width)
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            probabilities = _probabilities(q, keys, groups, start, stop)
            out[:, :, start:stop] = torch.bmm(probabilities, values[:, :stop]).view(-1, groups, stop - start, width)
        return out.view(batch, heads, length, width)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Gradients of q, k and v: with P the probabilities, dS = P * (dP - rowsum(P * dP))."""
        q, k, v = ctx.saved_tensors
        length, width = q.shape[2:]
        groups = q.shape[1] // k.shape[1]
        keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_q_blocks = grad_q.view(-1, groups, length, width)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            probabilities = _probabilities(q, keys, groups, start, stop)
            rows = _rows(grad, groups, start, stop)
            grad_v[:, :stop].baddbmm_(probabilities.transpose(1, 2), rows)
            upstream = torch.bmm(rows, values[:, :stop].transpose(1, 2))
            scores = torch._softmax_backward_data(upstream, probabilities, -1, probabilities.dtype).mul_(width**-0.5)
            grad_q_blocks[:, :, start:stop] = torch.bmm(scores, keys[:, :stop]).view(-1, groups, stop - start, width)
            grad_k[:, :stop].baddbmm_(scores.transpose(1, 2), _rows(q, groups, start, stop))
        return grad_q, grad_k.view_as(k), grad_v.view_as(v)


def _rows(x: Tensor, groups: int, start: int, stop: int) -> Tensor:
    """Rows start..stop of (B, H, T, D), the heads of one group under one another: (B K, groups (stop - start), D)."""
    width = x.shape[-1]
    return x[:, :, start:stop].reshape(-1, groups * (stop - start), width)


def _probabilities(q: Tensor, keys: Tensor, groups: int, start: int, stop: int) -> Tensor:
    """Softmax over the keys up to `stop`: (B K, groups (stop - start), stop)."""
    rows = _rows(q, groups, start, stop)
    future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
    mask = torch.zeros(stop - start, stop, dtype=q.dtype, device=q.device).masked_fill_(future, -math.inf)
    mask = mask.repeat(groups, 1) if groups > 1 else mask
    scores = torch.baddbmm(mask.unsqueeze(0), rows, keys[:, :stop].transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1)


def choose_backend(requested: str, device_type: str, dtype: torch.dtype) -> Backend:
    """The backend that `auto` means on this device in this dtype; a request stands. A table, so that a resume agrees."""
    if requested != "auto":
        return requested  # type: ignore[return-value]
    return "blocks" if device_type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def check_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> str | None:
    """Compare a backend with the reference on a small case; None where it agrees, else what went wrong.

    `heads` is (query heads, key-value heads, head width). Outputs and gradients must agree to 2e-2 of their largest
    value in a 16-bit dtype, to 1e-4 in float32. The random state is left as it was.
    """
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads, width = heads
    length = 65
    shapes = [(1, query_heads, length, width), (1, key_heads, length, width), (1, key_heads, length, width)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator).to(device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    try:
        found = _output_and_gradients(inputs, weight, backend)
    except RuntimeError as error:
        return f"attention backend {backend} does not run on {device.type} in {dtype}: {str(error).splitlines()[0]}"
    reference = _output_and_gradients([x.detach().float().requires_grad_() for x in inputs], weight.float(), "eager")
    for name, mine, theirs in zip(
        ("output", "gradient of q", "gradient of k", "gradient of v"), found, reference, strict=True
    ):
        difference = ((mine.float() - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= tolerance:
            return f"attention backend {backend} differs from the reference: {name} by {difference:.1e} (at most {tolerance:.0e})"
    return None


def _output_and_gradients(inputs: list[Tensor], weight: Tensor, backend: Backend) -> list[Tensor]:
    with torch.enable_grad():
        out = attend(inputs[0], inputs[1], inputs[2], backend)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
