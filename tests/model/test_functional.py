"""The forms that save memory against the plain ones, in value and gradient, and against finite differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.model import functional


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def tables(length: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    made = functional.rotary_tables(length, width, 10000.0, torch.device("cpu"))
    return [table.to(dtype).unsqueeze(1) for table in made]


def plain_rotate(x: Tensor) -> Tensor:
    return functional.plain_rotate(x, *tables(x.shape[1], x.shape[-1], x.dtype))


def apply(function: Any, *arguments: object) -> Tensor:
    """Apply an autograd function, which torch leaves without annotations."""
    out: Tensor = function.apply(*arguments)
    return out


def saving_rotate(x: Tensor) -> Tensor:
    return apply(functional.RotateSavingMemory, x, *tables(x.shape[1], x.shape[-1], x.dtype))


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (
        lambda x, w: functional.plain_rms_norm(x, w, 1e-5),
        lambda x, w: apply(functional.RMSNormSavingMemory, x, w, 1e-5),
        [(2, 5, 16), (16,)],
    ),
    "rotate": (plain_rotate, saving_rotate, [(2, 5, 3, 8)]),
    "swiglu": (lambda g, u: F.silu(g) * u, functional.SwiGLUSavingMemory.apply, [(2, 5, 16), (2, 5, 16)]),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_saving_form_equals_the_plain_one(name: str, dtype: torch.dtype, tolerance: float) -> None:
    plain, saving, shapes = PAIRS[name]
    inputs = drawn(*shapes, dtype=dtype)
    results = []
    for form in (plain, saving):
        out = form(*inputs)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()


@pytest.mark.parametrize("name", ["rotate", "swiglu"])
def test_the_saving_form_has_the_gradient_of_finite_differences(name: str) -> None:
    _, saving, shapes = PAIRS[name]
    assert torch.autograd.gradcheck(saving, drawn(*shapes))


def test_layer_norm_reduces_in_float32_whatever_the_input() -> None:
    x, weight, bias = drawn((4, 64), (64,), (64,), dtype=torch.float32)
    x = x * 100 + 1000
    expected = F.layer_norm(x.bfloat16().float(), (64,), weight, bias, 1e-5).bfloat16()
    assert torch.equal(functional.layer_norm(x.bfloat16(), weight, bias, 1e-5), expected)


def test_without_gradients_the_plain_form_is_taken_and_gives_the_same_bits() -> None:
    x, weight = drawn((3, 16), (16,), dtype=torch.float32)
    with torch.no_grad():
        plain = functional.rms_norm(x, weight, 1e-5)
    assert torch.equal(functional.rms_norm(x, weight, 1e-5), plain)
