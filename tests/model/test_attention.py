"""Every attention backend against the definition, and how one is chosen."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smollm2.model import attention

HEADS = [(4, 4, 32), (6, 2, 16), (4, 1, 64)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_agrees_with_the_reference(
    backend: attention.Backend, heads: tuple[int, int, int], dtype: torch.dtype, isolates: bool
) -> None:
    assert attention.check_backend(backend, torch.device("cpu"), dtype, heads, isolates=isolates) is None


@needs_gpu
@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flex", "eager"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backend_agrees_with_the_reference_on_a_gpu(
    backend: attention.Backend, heads: tuple[int, int, int], dtype: torch.dtype, isolates: bool
) -> None:
    assert attention.check_backend(backend, torch.device("cuda"), dtype, heads, isolates=isolates) is None


@needs_gpu
@pytest.mark.parametrize("backend", ["sdpa", "flex", "eager"])
def test_a_backend_isolates_documents_in_float32_on_a_gpu(backend: attention.Backend) -> None:
    assert attention.check_backend(backend, torch.device("cuda"), torch.float32, (6, 2, 16), isolates=True) is None


def random_case(length: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """q, k and v of two sequences with grouped heads, and the number of the document at each position."""
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, heads, length, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2)]
    ends = torch.rand(2, length, generator=generator) < 0.01
    return inputs, ends.cumsum(1)


def output_and_gradients(inputs: list[Tensor], backend: attention.Backend, document_ids: Tensor | None) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    ids = torch.zeros(inputs[0].shape[0], inputs[0].shape[2], dtype=torch.int64)
    q, k, v = inputs
    out = attention.attend(q, k, v, backend, attention.lay_out(document_ids, ids, backend))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 512, 513, 1100])
def test_blocks_agree_at_lengths_around_a_block(length: int, isolates: bool) -> None:
    inputs, document_ids = random_case(length)
    names: tuple[attention.Backend, attention.Backend] = ("blocks", "sdpa")
    results = [output_and_gradients(inputs, name, document_ids if isolates else None) for name in names]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_document_depends_on_another(backend: attention.Backend, dtype: torch.dtype) -> None:
    """Neither its output nor its gradients; the documents lie before, within and behind blocks of queries."""
    inputs, _ = random_case(700, dtype)
    document_ids = torch.bucketize(torch.arange(700), torch.tensor([100, 300, 520]), right=True).repeat(2, 1)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, :100] = torch.randn_like(x[:, :, :100])
        x[:, :, 520:] *= 3
    results = [output_and_gradients(case, backend, document_ids) for case in (inputs, changed)]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, :, 100:520], after[:, :, 100:520])
        assert not torch.equal(before[:, :, :100], after[:, :, :100])


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
def test_a_document_among_others_is_computed_as_it_is_alone(backend: attention.Backend) -> None:
    inputs, _ = random_case(700)
    document_ids = (torch.arange(700) >= 290).long().repeat(2, 1)
    packed = output_and_gradients(inputs, backend, document_ids)[0]
    q, k, v = (x[:, :, 290:] for x in inputs)
    alone = attention.attend(q, k, v, backend)
    torch.testing.assert_close(packed[:, :, 290:], alone, rtol=1e-12, atol=1e-12)


def test_blocks_do_not_read_the_blocks_of_keys_before_every_document() -> None:
    inputs, _ = random_case(700)
    document_ids = (torch.arange(700) >= torch.tensor([[300], [500]])).long()
    for x in inputs[1:]:
        x[:, :, :256] = torch.nan
    q, k, v = inputs
    out = attention.attend(q, k, v, "blocks", attention.lay_out(document_ids, document_ids, "blocks"))
    assert out[:, :, 512:].isfinite().all()


def test_the_layout_of_varlen_is_where_documents_begin_and_the_last_ends() -> None:
    document_ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])
    bounds = attention.lay_out(document_ids, document_ids, "varlen")
    whole = attention.lay_out(None, document_ids, "varlen")
    assert isinstance(bounds, Tensor) and bounds.tolist() == [0, 2, 5, 6, 7, 9, 10]
    assert isinstance(whole, Tensor) and whole.tolist() == [0, 5, 10]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("isolates", [False, True])
def test_flex_computes_the_same_where_no_gradient_is_asked_for(isolates: bool) -> None:
    inputs, document_ids = random_case(300, torch.float32)
    given = document_ids if isolates else None
    q, k, v = inputs
    backends: tuple[attention.Backend, attention.Backend] = ("flex", "eager")
    mine, theirs = (
        attention.attend(q, k, v, backend, attention.lay_out(given, document_ids, backend)) for backend in backends
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
def test_nothing_is_laid_out_where_documents_are_not_isolated(backend: attention.Backend) -> None:
    assert attention.lay_out(None, torch.zeros(2, 5, dtype=torch.int64), backend) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_a_backend_that_does_not_run_here_is_refused_in_one_sentence(backend: attention.Backend) -> None:
    found = attention.check_backend(backend, torch.device("cpu"), torch.bfloat16, (4, 2, 32))
    assert found is not None and "\n" not in found
    assert found.startswith(f"attention backend {backend} does not run on cpu in torch.bfloat16: ")


def test_a_backend_that_mixes_documents_is_found_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, mask, is_causal, **rest: real(q, k, v, is_causal=True, **rest),
    )
    whole, isolated = (
        attention.check_backend("sdpa", torch.device("cpu"), torch.float32, (4, 2, 16), isolates=isolates)
        for isolates in (False, True)
    )
    assert whole is None
    assert isolated is not None and "differs from the reference: output" in isolated


def test_a_backend_that_is_not_causal_is_found_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, is_causal, **rest: real(*args, **rest))
    found = attention.check_backend("sdpa", torch.device("cpu"), torch.float32, (4, 2, 16))
    assert found is not None
    assert "differs from the reference: output" in found


def test_the_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    attention.check_backend("sdpa", torch.device("cpu"), torch.float32, (4, 2, 16))
    assert torch.equal(before, torch.get_rng_state())


class ProductsInTf32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the inputs of float32 products to 10 bits of mantissa, as a GPU does in tf32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.baddbmm.default):
            args = tuple(round_to_tf32(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)
        return func(*args, **(kwargs or {}))


def round_to_tf32(x: Tensor) -> Tensor:
    return (((x.contiguous().view(torch.int32) + 0x1000) >> 13) << 13).view(torch.float32)


@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("backend", ["blocks", "eager"])
def test_the_check_accepts_the_rounding_of_tf32_where_it_was_requested_and_only_there(
    backend: attention.Backend, isolates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> str | None:
        return attention.check_backend(backend, torch.device("cpu"), torch.float32, (4, 2, 16), isolates=isolates)

    with ProductsInTf32():  # type: ignore[no-untyped-call]
        strict = check()
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert check() is None
    assert strict is not None and "differs from the reference" in strict


MODERN, OLD = frozenset({"fp16", "bf16", "tf32", "varlen"}), frozenset({"fp16"})
"""The features of GPUs of compute capability 8 and more, and of a T4 or V100."""


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "features", "isolates", "chosen"),
    [
        ("auto", "cpu", torch.bfloat16, frozenset({"bf16"}), False, "blocks"),
        ("auto", "cpu", torch.bfloat16, frozenset({"bf16"}), True, "blocks"),
        ("auto", "cpu", torch.float32, frozenset(), False, "sdpa"),
        ("auto", "cpu", torch.float32, frozenset(), True, "sdpa"),
        ("auto", "cuda", torch.bfloat16, MODERN, False, "sdpa"),
        ("auto", "cuda", torch.bfloat16, MODERN, True, "varlen"),
        ("auto", "cuda", torch.float16, MODERN, True, "varlen"),
        ("auto", "cuda", torch.float16, OLD, True, "sdpa"),
        ("auto", "cuda", torch.float16, OLD, False, "sdpa"),
        ("auto", "cuda", torch.float32, MODERN, True, "sdpa"),
        ("auto", "mps", torch.float32, frozenset({"fp16", "bf16"}), True, "sdpa"),
        ("auto", "mps", torch.bfloat16, frozenset({"fp16", "bf16"}), True, "sdpa"),
        ("eager", "cpu", torch.bfloat16, frozenset({"bf16"}), True, "eager"),
        ("sdpa", "cuda", torch.bfloat16, MODERN, True, "sdpa"),
        ("flex", "cuda", torch.bfloat16, MODERN, False, "flex"),
    ],
)
def test_the_choice_is_a_table_over_device_dtype_and_features(
    requested: str, device: str, dtype: torch.dtype, features: frozenset[str], isolates: bool, chosen: str
) -> None:
    assert attention.choose_backend(requested, device, dtype, features, isolates=isolates) == chosen
