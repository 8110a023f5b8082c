"""Normalization, rotary embedding and SwiGLU; all but LayerNorm also have a form that saves less for the backward pass.

Eager training uses the memory-saving forms, which save 10 % of a run's time and a fifth of its memory on two cores in
bf16 (benchmarks/README.md). Inference and compiled code use the plain forms; the compiler fuses them itself.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def _plain() -> bool:
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, as in transformers' LlamaRMSNorm: x (..., C), weight (C,).

    The normalized values are computed in float32 and rounded to the dtype of x before they are multiplied by the
    weight.
    """
    if _plain():
        return plain_rms_norm(x, weight, eps)
    out: Tensor = RMSNormSavingMemory.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` with torch's own backward pass."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight.to(x.dtype)


class RMSNormSavingMemory(torch.autograd.Function):
    """RMSNorm that saves, besides the weight, only x (kept anyway as the residual stream) and one number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        """Return the same as `plain_rms_norm`."""
        wide = x.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        """Return dx = s * grad * weight - x * s^3 * mean(grad * weight * x) and dweight = sum(s * grad * x),
        with s = 1 / sqrt(mean(x^2) + eps)."""
        x, weight, scale = ctx.saved_tensors
        wide, wide_grad = x.float(), grad.float()
        product = (wide_grad * wide).flatten(0, -2)
        grad_weight = scale.flatten() @ product
        share = (product @ weight.float()).view_as(scale).mul_(scale**3).div_(x.shape[-1])
        grad_x = (wide_grad * scale).mul_(weight.float()).addcmul_(wide, share, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias, computed in float32, in the dtype of x (..., C)."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def rotary_tables(
    positions: int, width: int, theta: float, device: torch.device, scaling: Mapping[str, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of position x theta^(-2i / width), each (positions, width / 2), float32.

    `scaling` are the numbers of Llama 3's rope scaling; none if empty.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width)
    if scaling:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies: Tensor, scaling: Mapping[str, float]) -> Tensor:
    """Return Llama 3's frequencies for a longer context than the one trained with first (arXiv 2407.21783; the formula is
    that of transformers): waves that turn less than low_freq_factor times in the original context are slowed down by
    factor, those that turn more than high_freq_factor times are kept, and those in between are interpolated."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding in the half-split layout of transformers' Llama to x (B, T, H, D).

    cos and sin are (T, D / 2), or (B, T, D / 2) if each sequence has its own positions. Each pair (x[i], x[i + D / 2])
    is rotated by the angle of its position.
    """
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    if _plain():
        return plain_rotate(x, cos, sin)
    out: Tensor = RotateSavingMemory.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `rotate` with tables of shape (..., T, 1, D / 2) in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RotateSavingMemory(torch.autograd.Function):
    """Rotary embedding that does not save x: the backward pass rotates the gradient by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Return the same as `plain_rotate`, stored in the memory order in which attention reads it: (B, H, T, D)."""
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        return _turn(x, cos, sin, out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        """Return the gradient rotated back, in the memory order that the backward pass of the projection needs."""
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, torch.empty_like(grad, memory_format=torch.contiguous_format)), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Compute `plain_rotate` into `out`, with fewer passes over memory."""
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both are (..., I)."""
    if _plain():
        return F.silu(gate) * up
    out: Tensor = SwiGLUSavingMemory.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class SwiGLUSavingMemory(torch.autograd.Function):
    """SwiGLU that saves only gate and up; silu(gate) is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Return silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Return d gate = grad * up * silu'(gate) and d up = grad * silu(gate)."""
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v with each head repeated, so that there is one for each query head."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
