"""Every attention backend against the reference, with and without documents, alone and inside the model."""

from typing import get_args

import pytest
import torch
from gpu_runs import loss_and_gradient, make_batch, make_config

from smollm2.model.attention import Backend, check_backend

BACKENDS: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "eager")
HEADS = [(4, 4, 32), (6, 2, 64), (9, 3, 64)]
"""Query heads, key-value heads, head width; the last is SmolLM2-135M's."""


def skip_if_the_kernel_is_not_for_this_device(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and backend in ("varlen", "flex"):
        pytest.skip(f"{backend} is for CUDA")
    if device.type == "cuda" and backend == "blocks":
        pytest.skip("blocks is for CPUs")
    if backend == "varlen" and dtype == torch.float32:
        pytest.skip("varlen is for 16 bits")
    if backend == "varlen" and torch.cuda.get_device_capability(device)[0] < 8:
        pytest.skip("varlen needs a GPU of compute capability 8")


@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_agrees_with_the_reference(
    device: torch.device, backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int], isolates: bool
) -> None:
    skip_if_the_kernel_is_not_for_this_device(backend, device, dtype)
    assert check_backend(backend, device, dtype, heads, isolates=isolates) is None


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_has_the_gradient_of_the_reference_with_each_backend(
    device: torch.device, backend: Backend, documents: bool
) -> None:
    skip_if_the_kernel_is_not_for_this_device(backend, device, torch.bfloat16)
    batch = make_batch(device, documents=documents)
    found = {}
    for attention in ("eager", backend):
        config = make_config(precision="bf16", attention=attention, document_mask=documents)
        found[attention] = loss_and_gradient(config, batch)
    (expected_loss, expected), (loss, gradient) = found["eager"], found[backend]
    assert loss == pytest.approx(expected_loss, rel=5e-3)
    assert (gradient - expected).norm() <= 5e-2 * expected.norm()


def test_the_document_mask_changes_the_loss(device: torch.device) -> None:
    """Otherwise the comparison above would compare nothing."""
    config = make_config(document_mask=True)
    ids, labels, documents = make_batch(device, documents=True)
    isolated, _ = loss_and_gradient(config, (ids, labels, documents))
    whole, _ = loss_and_gradient(config, (ids, labels))
    assert abs(isolated - whole) > 1e-4
