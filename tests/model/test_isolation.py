"""Isolated documents, from the tokens of a window to the logits: none of them affects another."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from twins import small_model

from smollm2.data.packing import PackedWindows, pack_documents
from smollm2.data.windows import Batch, Windows
from smollm2.model.attention import Backend
from smollm2.model.transformer import SmolLM2
from smollm2.plan.arithmetic import QUERY_BLOCK

pytestmark = pytest.mark.usefixtures("one_thread")

END, LENGTH = 0, QUERY_BLOCK * 3 // 2
SIZES = [60, 420, 50, 24, 120, 3, 80, 102, 40]
"""Lengths of documents; the second is longer than two windows."""

KINDS = ["packed", "contiguous"]
BACKENDS: list[Backend] = ["eager", "sdpa", "blocks"]
DTYPES = [torch.float32, torch.bfloat16]


def read_windows(kind: str) -> Iterator[Batch]:
    """Every window of a stream of random documents."""
    ends = np.cumsum(SIZES).astype(np.uint64)
    tokens = np.random.default_rng(0).integers(1, 320, sum(SIZES)).astype(np.uint16)
    tokens[ends - 1] = END
    if kind == "packed":
        windows: PackedWindows | Windows = PackedWindows(tokens, pack_documents(ends, LENGTH), 320, END)
    else:
        windows = Windows(tokens, LENGTH, LENGTH, 320, END)
    return (windows.read(i) for i in range(len(windows)))


def compute_logits(model: SmolLM2, input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """The logits (T, V) of one sequence (T,)."""
    with torch.no_grad():
        logits: Tensor = model(input_ids[None], document_ids=None if document_ids is None else document_ids[None])
    return logits[0]


def documents_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The input ids and document ids of a window, without its padding."""
    assert batch.document_ids is not None
    used = int(np.flatnonzero(batch.labels >= 0)[-1]) + 1
    return torch.from_numpy(batch.input_ids[:used]), torch.from_numpy(batch.document_ids[:used])


@pytest.mark.parametrize("kind", KINDS)
def test_some_window_holds_several_documents(kind: str) -> None:
    assert max(int(documents_of(batch)[1].max()) for batch in read_windows(kind)) >= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_another_token_in_one_document_changes_no_bit_of_the_logits_of_others(
    kind: str, backend: Backend, dtype: torch.dtype
) -> None:
    model = small_model(max_position_embeddings=LENGTH).to(dtype)
    model.model.attention_backend = backend
    for batch in read_windows(kind):
        input_ids, document_ids = documents_of(batch)
        before = compute_logits(model, input_ids, document_ids)
        for document in range(int(document_ids.max()) + 1):
            inside = document_ids == document
            for at in inside.nonzero().flatten()[[0, -1]].tolist():
                changed = input_ids.clone()
                changed[at] = (changed[at] + 7) % 320
                after = compute_logits(model, changed, document_ids)
                assert torch.equal(before[~inside], after[~inside])
                assert not torch.equal(before[at], after[at])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_a_document_in_a_window_are_those_of_the_document_alone(kind: str, backend: Backend) -> None:
    """Although its rotary positions begin elsewhere: only their differences matter, up to the rounding of their angles. The
    difference is 3e-6 here, and grows with the position to 3e-5 at 2,000 and 1e-4 at 8,000 (2026-11, float32)."""
    model = small_model(max_position_embeddings=LENGTH)
    model.model.attention_backend = backend
    for batch in read_windows(kind):
        input_ids, document_ids = documents_of(batch)
        together = compute_logits(model, input_ids, document_ids)
        for document in range(int(document_ids.max()) + 1):
            inside = document_ids == document
            alone = compute_logits(model, input_ids[inside], None)
            torch.testing.assert_close(together[inside], alone, rtol=0, atol=1e-5)
