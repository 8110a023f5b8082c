"""The backend `varlen`: torch's flash kernel over documents of any length, for CUDA in 16 bits."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from smollm2.model.functional import repeat_heads


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Return attention over the documents of all sequences, concatenated as torch's flash kernel expects them.

    Shapes are as in attention.py. `bounds` (N + 1,) int32 contains the start of each of the N documents and the end of
    the last one.
    """
    options: dict[str, Any] = {"is_causal": True} if takes_option("is_causal") else {"window_size": (-1, 0)}
    if takes_option("enable_gqa"):
        options["enable_gqa"] = True
    else:
        k, v = repeat_heads(q, k, v)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B T, heads, D)
    length = q.shape[2]  # an upper bound: finding the longest document would cost a synchronization
    out = cast(Tensor, varlen_attn(rows[0], rows[1], rows[2], bounds, bounds, length, length, **options))
    return out.view(q.shape[0], length, *out.shape[1:]).transpose(1, 2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes_option(name: str) -> bool:
    """Return whether `varlen_attn` has an option: torch 2.10 and 2.12 name the one for causal masking differently."""
    return name in inspect.signature(varlen_attn).parameters
