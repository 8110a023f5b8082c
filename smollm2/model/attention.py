"""Causal attention: softmax(q k^T / sqrt(D)) v, each position over itself and those before it.

Shapes: q (B, H, T, D), k and v (B, K, T, D) with K dividing H; query head h reads key-value head h // (H / K). Five
backends compute the same function: `sdpa` (torch's flash kernels), `blocks` (matrix products over blocks of queries,
for CPUs in bf16, where torch's kernel is slow), `varlen` (torch's flash kernel over documents of any length, for CUDA in
16 bits), `flex` (torch's compiled block masks, for CUDA) and `eager` (the definition, the reference of the tests). A
backend is used only after `check_backend` saw it agree with the reference.

Where documents are isolated a position sees its own document alone. The rotary positions go on through the window: they
act by their differences.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from smollm2.model.blocks import BlockAttention

Backend = Literal["sdpa", "blocks", "varlen", "flex", "eager"]


Layout = Tensor | BlockMask | None
"""Which positions see which, in the form that a backend wants; None: all those before them."""


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend, layout: Layout = None) -> Tensor:
    """Attention output (B, H, T, D) in the dtype of `v`; `layout` is what `lay_out` made for this backend."""
    if isinstance(layout, BlockMask):
        return attend_flex(q, k, v, layout)
    if backend == "sdpa":
        if layout is not None and q.is_cuda:  # the kernel that takes a mask there takes no grouped heads
            k, v = repeat_heads(q, k, v)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, layout, is_causal=layout is None, enable_gqa=grouped)
    if backend == "blocks":
        out: Tensor = BlockAttention.apply(q, k, v, layout)  # type: ignore[no-untyped-call]
        return out
    return eager_attention(q, k, v, layout) if layout is None or backend == "eager" else attend_varlen(q, k, v, layout)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, layout: Tensor | None) -> Tensor:
    """The definition, with the softmax in float32 and the whole (T, T) score matrix in memory."""
    k, v = repeat_heads(q, k, v)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    seen = see_past(scores.shape[-1], q.device) if layout is None else layout
    probabilities: Tensor = scores.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype)
    return probabilities @ v


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with a head for each of q."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def see_past(length: int, device: torch.device) -> Tensor:
    """(T, T), true where the position of the row may see that of the column: itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def lay_out(document_ids: Tensor | None, input_ids: Tensor, backend: Backend) -> Layout:
    """Which positions see which, made once for all layers, from the number of the document at each position (B, T),
    which rises along T; None: one document a sequence.

    For `blocks` where the position's document begins, (B, T); for `varlen` where each document begins and the last ends
    in B x T, (N + 1); for `flex` its mask of blocks; else true where the row may see the column, (B, 1, T, T).
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


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """The documents of all sequences one after another, as torch's flash kernel takes them."""
    options: dict[str, Any] = {"is_causal": True} if takes_option("is_causal") else {"window_size": (-1, 0)}
    if takes_option("enable_gqa"):
        options["enable_gqa"] = True
    else:
        k, v = repeat_heads(q, k, v)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B T, heads, D)
    length = q.shape[2]  # no document is longer; how long the longest is would be a wait for the device
    out = cast(Tensor, varlen_attn(rows[0], rows[1], rows[2], bounds, bounds, length, length, **options))
    return out.view(q.shape[0], length, *out.shape[1:]).transpose(1, 2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes_option(name: str) -> bool:
    """Whether this torch's `varlen_attn` knows an option: 2.10 asks for a causal mask otherwise than 2.12."""
    return name in inspect.signature(varlen_attn).parameters


def lay_out_flex(starts: Tensor) -> BlockMask:
    """The blocks of the (T, T) scores that `flex` must compute."""

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column >= starts[batch, row])

    count, length = starts.shape
    return create_block_mask(sees, count, None, length, length, device=starts.device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Compiled on a GPU; a CPU has no backward pass for it, and takes the plain form."""
    run = compile_flex() if q.is_cuda else cast(Callable[..., Tensor], flex_attention)
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compile_flex() -> Callable[..., Tensor]:
    """One compiled function for all layers."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention))


def choose_backend(requested: str, device_type: str, dtype: torch.dtype, *, isolates: bool = False) -> Backend:
    """The backend that `auto` means on this device in this dtype, documents isolated or not; a request stands. A table,
    so that a resume agrees."""
    if requested != "auto":
        return requested  # type: ignore[return-value]
    if device_type == "cuda" and isolates and dtype != torch.float32:
        return "varlen"
    return "blocks" if device_type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def check_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], *, isolates: bool = False
) -> str | None:
    """Compare a backend with the reference on a small case; None where it agrees, else what went wrong.

    `heads` is (query heads, key-value heads, head width); with `isolates` the case holds several documents. Outputs and
    gradients must agree to 2e-2 of their largest value in a 16-bit dtype, to 1e-4 in float32. The random state is left
    as it was.
    """
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads, width = heads
    length = 65
    shapes = [(2, query_heads, length, width), (2, key_heads, length, width), (2, key_heads, length, width)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator).to(device, dtype)
    ids = (torch.arange(length).repeat(2, 1) // torch.tensor([[23], [32]])).to(device) if isolates else None
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    try:
        found = _output_and_gradients(inputs, weight, backend, ids)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch's advice, which may follow, is not the user's
        return f"attention backend {backend} does not run on {device.type} in {dtype}: {reason}"
    wide = [x.detach().float().requires_grad_() for x in inputs]
    reference = _output_and_gradients(wide, weight.float(), "eager", ids)
    for name, mine, theirs in zip(
        ("output", "gradient of q", "gradient of k", "gradient of v"), found, reference, strict=True
    ):
        difference = ((mine.float() - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= tolerance:
            return f"attention backend {backend} differs from the reference: {name} by {difference:.1e} (at most {tolerance:.0e})"
    return None


def _output_and_gradients(
    inputs: list[Tensor], weight: Tensor, backend: Backend, document_ids: Tensor | None
) -> list[Tensor]:
    q, k, v = inputs
    layout = lay_out(document_ids, torch.zeros(len(q), q.shape[2], dtype=torch.int64, device=q.device), backend)
    with torch.enable_grad():
        out = attend(q, k, v, backend, layout)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
