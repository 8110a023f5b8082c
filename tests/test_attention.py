"""Every attention backend against the definition, and how one is chosen."""

import pytest
import torch

from smollm2 import attention


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@pytest.mark.parametrize("heads", [(4, 4, 32), (6, 2, 16), (4, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_agrees_with_the_reference(backend: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert attention.check_backend(backend, torch.device("cpu"), dtype, heads) is None


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
def test_blocks_agree_at_lengths_around_a_block(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("blocks", "sdpa"):
        out = attention.attend(*inputs, backend)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_backend_that_is_not_causal_is_found_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *args, is_causal, **rest: real(*args, **rest)
    )
    found = attention.check_backend("sdpa", torch.device("cpu"), torch.float32, (4, 2, 16))
    assert found is not None
    assert "differs from the reference: output" in found


def test_the_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    attention.check_backend("sdpa", torch.device("cpu"), torch.float32, (4, 2, 16))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "chosen"),
    [
        ("auto", "cpu", torch.bfloat16, "blocks"),
        ("auto", "cpu", torch.float32, "sdpa"),
        ("auto", "cuda", torch.bfloat16, "sdpa"),
        ("eager", "cpu", torch.bfloat16, "eager"),
        ("sdpa", "cpu", torch.bfloat16, "sdpa"),
    ],
)
def test_the_choice_is_a_table(requested: str, device: str, dtype: torch.dtype, chosen: str) -> None:
    assert attention.choose_backend(requested, device, dtype) == chosen
