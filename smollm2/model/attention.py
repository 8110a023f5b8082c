"""Causal attention: softmax(q k^T / sqrt(D)) v; each position attends to itself and earlier positions.

Shapes: q (B, H, T, D), k and v (B, K, T, D) with K dividing H; query head h uses key-value head h // (H / K). All
backends compute the same function:

    sdpa     torch's scaled_dot_product_attention
    blocks   matrix products over blocks of queries (blocks.py), for CPUs in bf16
    varlen   torch's flash kernel over documents of any length, for CUDA in 16 bits
    flex     torch's flex_attention, compiled with a block mask, for CUDA
    eager    the formula above, used as the reference in checks and tests

If documents are isolated, a position attends only to its own document. Rotary positions do not restart at each
document, because only their differences matter.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from smollm2.model.blocks import BlockAttention
from smollm2.model.functional import repeat_heads

Backend = Literal["sdpa", "blocks", "varlen", "flex", "eager"]


Layout = Tensor | BlockMask | None
"""Which positions attend to which, in the form that a backend expects; None means plain causal attention."""


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend, layout: Layout = None) -> Tensor:
    """Return the attention output (B, H, T, D) in the dtype of `v`; `layout` comes from `lay_out` for this backend."""
    if isinstance(layout, BlockMask):
        return attend_flex(q, k, v, layout)
    if backend == "sdpa":
        if layout is not None and q.is_cuda:  # the CUDA kernel that accepts a mask does not support grouped heads
            k, v = repeat_heads(q, k, v)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, layout, is_causal=layout is None, enable_gqa=grouped)
    if backend == "blocks":
        out: Tensor = BlockAttention.apply(q, k, v, layout)  # type: ignore[no-untyped-call]
        return out
    if layout is None or backend == "eager":
        return eager_attention(q, k, v, layout)
    # Imported here because torch's varlen module imports torch's compiler, which takes as long as torch itself.
    from smollm2.model.varlen import attend_varlen

    return attend_varlen(q, k, v, layout)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, layout: Tensor | None) -> Tensor:
    """Return the output of the plain formula, with the softmax in at least float32 and all (T, T) scores in memory."""
    k, v = repeat_heads(q, k, v)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    seen = see_past(scores.shape[-1], q.device) if layout is None else layout
    probabilities: Tensor = scores.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype)
    return probabilities @ v


def see_past(length: int, device: torch.device) -> Tensor:
    """Return the causal mask (T, T): true if the row's position attends to the column's, itself or an earlier one."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def lay_out(document_ids: Tensor | None, input_ids: Tensor, backend: Backend) -> Layout:
    """Return which positions attend to which, computed once for all layers.

    `document_ids` (B, T) is the document number of each position and does not decrease along T; None means one document
    per sequence. For `blocks`, the result (B, T) is the first position of each position's document. For `varlen`, it is
    the start of each of the N documents in the B x T tokens, and the end of the last: (N + 1,). For `flex`, it is a
    block mask. For the others, it is a mask (B, 1, T, T), true if the row may attend to the column.
    """
    if document_ids is None:
        if backend not in ("varlen", "flex"):
            return None
        document_ids = torch.zeros_like(input_ids)
    positions = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = document_ids.diff(dim=1, prepend=document_ids[:, :1] - 1) != 0
    starts = torch.where(begins, positions, 0).cummax(1).values
    if backend == "blocks":
        return starts
    if backend == "varlen":
        return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()
    if backend == "flex":
        return lay_out_flex(starts)
    return (see_past(len(positions), positions.device) & (positions >= starts.unsqueeze(-1))).unsqueeze(1)


def lay_out_flex(starts: Tensor) -> BlockMask:
    """Return the block mask for `flex`, which says which blocks of the (T, T) scores to compute."""

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column >= starts[batch, row])

    count, length = starts.shape
    return create_block_mask(sees, count, None, length, length, device=starts.device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Return the output of torch's flex_attention: compiled on a GPU, eager on a CPU (without a backward pass)."""
    run = compile_flex() if q.is_cuda else cast(Callable[..., Tensor], flex_attention)
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compile_flex() -> Callable[..., Tensor]:
    """Return flex_attention, compiled once for all layers."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention))


def choose_backend(
    requested: str, device_type: str, dtype: torch.dtype, features: frozenset[str], *, isolates: bool = False
) -> Backend:
    """Return the requested backend, or for `auto` one chosen by fixed rules, so a resumed run makes the same choice.

    `features` are what the device supports, and `isolates` says whether documents are isolated.
    """
    if requested != "auto":
        return requested  # type: ignore[return-value]
    if device_type == "cuda" and isolates and dtype != torch.float32 and "varlen" in features:
        return "varlen"
    return "blocks" if device_type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def check_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], *, isolates: bool = False
) -> str | None:
    """Compare a backend with the reference on a small input; return None if they agree, else a message.

    `heads` is (query heads, key-value heads, head width); with `isolates`, the input has several documents. The
    reference is computed on the CPU in float64, so neither tf32 nor the device's own rounding affects it. The global
    random state is not changed.
    """
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads, width = heads
    length = 65
    shapes = [(2, query_heads, length, width), (2, key_heads, length, width), (2, key_heads, length, width)]
    rounded = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator).to(dtype)
    ids = torch.arange(length).repeat(2, 1) // torch.tensor([[23], [32]]) if isolates else None
    inputs = [x.to(device).requires_grad_() for x in rounded]
    try:
        found = _output_and_gradients(inputs, weight.to(device), backend, None if ids is None else ids.to(device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # the rest may be torch's advice, not meant for users
        return f"attention backend {backend} does not run on {device.type} in {dtype}: {reason}"
    exact = [x.double().requires_grad_() for x in rounded]
    reference = _output_and_gradients(exact, weight.double(), "eager", ids)
    names, limit = ("output", "gradient of q", "gradient of k", "gradient of v"), largest_difference(dtype)
    for name, tensor, expected in zip(names, found, reference, strict=True):
        difference = ((tensor.cpu().double() - expected).abs().max() / expected.abs().max()).item()
        if not difference <= limit:
            return f"attention backend {backend} differs from the reference: {name} by {difference:.1e} (at most {limit:.0e})"
    return None


def largest_difference(dtype: torch.dtype) -> float:
    """Return the largest difference from the reference that rounding can explain, relative to the largest value."""
    if dtype != torch.float32:
        return 2e-2
    # tf32 has 10 mantissa bits, bf16 has 7; measured differences are up to 5e-4.
    return 1e-4 if torch.get_float32_matmul_precision() == "highest" else 2.5e-3


def _output_and_gradients(
    inputs: list[Tensor], weight: Tensor, backend: Backend, document_ids: Tensor | None
) -> list[Tensor]:
    q, k, v = inputs
    layout = lay_out(document_ids, torch.zeros(len(q), q.shape[2], dtype=torch.int64, device=q.device), backend)
    with torch.enable_grad():
        out = attend(q, k, v, backend, layout)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
