"""The chunked loss against the plain one: value, gradients, counts, z-loss, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.model.loss import next_token_loss


def case(tokens: int = 1100, width: int = 24, vocabulary: int = 97, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::7] = -100
    return [hidden, weight, labels]


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """(cross-entropy sum, what z-loss adds to it)."""
    logits = (hidden @ weight.T).float()
    penalty = z_loss * logits.logsumexp(-1).square()[labels != -100].sum()
    return F.cross_entropy(logits, labels, reduction="sum"), penalty


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_equal_the_plain_form(z_loss: float, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = case(dtype=dtype)
    expected, penalty = plain_loss(hidden, weight, labels, z_loss)
    total, count = next_token_loss(hidden, weight, labels, z_loss=z_loss)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert count == (labels != -100).sum()
    theirs = torch.autograd.grad(expected + penalty, (hidden, weight))
    for mine, reference in zip(torch.autograd.grad(total, (hidden, weight)), theirs, strict=True):
        assert (mine - reference).float().norm() <= tolerance * reference.float().norm()


def test_the_sum_does_not_round_to_the_compute_dtype() -> None:
    hidden, weight, labels = case(tokens=4096, dtype=torch.bfloat16)
    total, _ = next_token_loss(hidden, weight, labels)
    assert total.item() == pytest.approx(plain_loss(hidden, weight, labels)[0].item(), rel=1e-6)


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = case()
    total, count = next_token_loss(hidden, weight, torch.full_like(labels, -100))
    assert (total.item(), count.item()) == (0.0, 0)
    assert not any(g.any() for g in torch.autograd.grad(total, (hidden, weight)))


def test_without_z_loss_its_code_changes_no_bit() -> None:
    hidden, weight, labels = case()
    gradients = [
        torch.autograd.grad(loss, (hidden, weight))
        for loss, _ in (next_token_loss(hidden, weight, labels), next_token_loss(hidden, weight, labels, z_loss=0.0))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    hidden, weight, labels = case(tokens=4096, vocabulary=4096)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():  # type: ignore[no-untyped-call]
        total, _ = next_token_loss(hidden, weight, labels)
        torch.autograd.backward(total)
    assert 0 < largest <= 4096 * 512


@pytest.mark.parametrize("count", [98_304, 28_672, 3])
def test_the_gradient_below_a_16_bit_head_has_no_systematic_factor(count: int) -> None:
    """1 / 98,304 in bf16 is 0.18 % too large."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(50, 32, generator=generator) / 6
    labels = torch.randint(0, 50, (64,), generator=generator)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = hidden.to(torch.bfloat16).to(dtype).requires_grad_()
        loss, _ = next_token_loss(leaf, weight.to(torch.bfloat16).to(dtype), labels)
        (found,) = torch.autograd.grad(loss * (1 / torch.tensor(float(count))), leaf)
        return found.float()

    exact, found = gradient(torch.float32), gradient(torch.bfloat16)
    assert ((found * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=5e-4)


def test_an_fp16_overflow_in_the_heads_gradient_goes_away_with_a_smaller_loss_scale() -> None:
    """Of 512 rows with the same target the sum is 512 x 200, above fp16's largest number 65,504."""
    hidden, labels = torch.full((512, 8), 200.0, dtype=torch.float16), torch.zeros(512, dtype=torch.int64)

    def gradient(scale: float) -> Tensor:
        weight = torch.zeros(4, 8, dtype=torch.float16).requires_grad_()
        loss, _ = next_token_loss(hidden, weight, labels, gradient_scale=torch.tensor(scale))
        (found,) = torch.autograd.grad(loss * scale, weight)
        return found.float() / scale

    assert not gradient(1.0).isfinite().all()
    expected = torch.tensor([-0.75, 0.25, 0.25, 0.25]).unsqueeze(1).expand(4, 8) * 512 * 200
    assert torch.allclose(gradient(2**-4), expected, rtol=1e-3)
