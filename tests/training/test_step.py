"""One update: accumulation, clipping, the finite check, the loss scale, and when too many updates were skipped."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from twins import blocks_of, gradient_of, small_model

from smollm2.config.schema import TrainingConfig
from smollm2.errors import ConfigError, TrainingError
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import Runtime, start_runtime
from smollm2.training.memory import micro_batch_size
from smollm2.training.optim import build_optimizers
from smollm2.training.progress import too_many_skips
from smollm2.training.step import StepResult, accumulate_gradients, adjust_loss_scale, train_step


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(TrainingConfig(precision="float32"))


def batch(rows: int = 16, length: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 320, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[3, 5:] = -100  # unequal counts, so that a mean of means would differ
    labels[9, :20] = -100
    return ids[:, :-1], labels


def split(size: int) -> list[tuple[Tensor, Tensor]]:
    input_ids, labels = batch()
    return list(zip(torch.split(input_ids, size), torch.split(labels, size), strict=True))


def gradient(runtime: Runtime, size: int) -> tuple[Tensor, Tensor]:
    model = small_model()
    loss, _ = accumulate_gradients(model, split(size), runtime)
    return loss, gradient_of(model)


@pytest.mark.parametrize("size", [16, 8, 7, 4, 1])
def test_accumulation_gives_the_gradient_of_the_whole_batch(runtime: Runtime, size: int) -> None:
    model = small_model()
    input_ids, labels = batch()
    logits = model(input_ids)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.autograd.backward(mean)
    expected = gradient_of(model)
    loss, found = gradient(runtime, size)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_documents_are_isolated_however_the_batch_is_cut(runtime: Runtime) -> None:
    input_ids, labels = batch()
    document_ids = (torch.arange(24) >= torch.arange(4, 20)[:, None]).long()  # in each sequence elsewhere
    pieces = [
        (input_ids[row : row + 1, part], labels[row : row + 1, part])
        for row in range(16)
        for part in (slice(row + 4), slice(row + 4, None))
    ]
    whole = list(zip(*(torch.split(x, 8) for x in (input_ids, labels, document_ids)), strict=True))
    results = []
    for micro_batches in (pieces, whole):
        model = small_model()
        loss, count = accumulate_gradients(model, micro_batches, runtime)
        results.append((loss.item(), count, gradient_of(model)))
    (whole_loss, whole_count, gradient), (packed_loss, packed_count, packed) = results
    assert packed_loss == pytest.approx(whole_loss, rel=1e-6) and packed_count == whole_count
    assert (packed - gradient).norm() <= 1e-5 * gradient.norm()


def run_update(
    runtime: Runtime, model: SmolLM2, micro_batches: Sequence[tuple[Tensor, Tensor]], max_grad_norm: float = 1.0
) -> tuple[StepResult, dict[str, torch.optim.Optimizer]]:
    optimizers = build_optimizers(model, TrainingConfig(learning_rate=0.1))
    result = train_step(model, optimizers, micro_batches, runtime, learning_rate=0.1, max_grad_norm=max_grad_norm)
    return result, optimizers


def test_the_reported_norm_is_that_of_the_gradient_before_clipping(runtime: Runtime) -> None:
    _, expected = gradient(runtime, 16)
    result, _ = run_update(runtime, small_model(), split(16))
    assert result.grad_norm == pytest.approx(expected.norm().item(), rel=1e-5)
    assert result.tokens == int((batch()[1] != -100).sum())


@pytest.mark.parametrize(("limit", "norm"), [(0.5, 0.5), (1e9, None), (0.0, None)])
def test_clipping_scales_to_the_limit_and_never_up(runtime: Runtime, limit: float, norm: float | None) -> None:
    model = small_model()
    seen: list[Tensor] = []
    optimizers = build_optimizers(model, TrainingConfig())
    optimizers["adamw"].register_step_pre_hook(lambda *_: seen.append(gradient_of(model).norm()))
    result = train_step(model, optimizers, split(16), runtime, learning_rate=0.1, max_grad_norm=limit)
    assert seen[0].item() == pytest.approx(norm or result.grad_norm, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "one gradient"])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_moments(
    runtime: Runtime, value: float, place: str
) -> None:
    model = small_model()
    optimizers = build_optimizers(model, TrainingConfig(optimizer="muon"))
    train_step(model, optimizers, split(8), runtime, learning_rate=0.1, max_grad_norm=1.0)
    before = [x.clone() for x in everything(model, optimizers)]
    if place == "loss":
        model.register_forward_hook(lambda module, args, out: (out[0] * value, out[1]))
    else:
        weight = blocks_of(model)[1].mlp.up_proj.weight
        weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), value))  # type: ignore[no-untyped-call]
    result = train_step(model, optimizers, split(8), runtime, learning_rate=0.1, max_grad_norm=1.0)
    assert result.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizers), strict=True))


def everything(model: SmolLM2, optimizers: dict[str, torch.optim.Optimizer]) -> list[Tensor]:
    moments = [x for o in optimizers.values() for s in o.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [*(p.detach() for p in model.parameters()), *moments]


@pytest.mark.parametrize(
    ("global_batch", "world", "batch_size", "expected"),
    [(48, 1, 12, 12), (48, 4, 12, 12), (48, 8, 12, 6), (30, 2, 8, 8), (7, 1, 4, 4), (52, 4, 12, 7), (16, 16, 8, 1)],
)
def test_a_ranks_share_is_cut_into_as_few_nearly_equal_micro_batches_as_batch_size_allows(
    global_batch: int, world: int, batch_size: int, expected: int
) -> None:
    assert micro_batch_size(global_batch, world, batch_size) == expected


@pytest.mark.parametrize(("world", "nearest"), [(5, "45 or 50"), (64, "64")])
def test_a_batch_that_the_devices_cannot_share_is_refused_with_the_nearest(world: int, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{world} devices cannot share equally. The nearest possible size is {nearest}"
    ):
        micro_batch_size(48, world, 12)


def test_the_loss_scale_stops_the_run_before_it_reaches_zero() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    scales = []

    def overflow_for_ever() -> None:
        while True:
            torch.autograd.backward(scaler.scale(parameter.sum() * math.inf))
            scaler.unscale_(optimizer)
            adjust_loss_scale(scaler)
            scales.append(scaler.get_scale())

    with pytest.raises(TrainingError, match="overflows even at a loss scale of 1"):
        overflow_for_ever()
    assert scales == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("skipped", "step", "fp16", "stops"),
    [
        ([], 50, False, None),
        (range(1, 10), 9, False, None),
        (range(1, 11), 10, False, "10 steps in a row"),
        ([*range(1, 6), *range(7, 12)], 11, False, None),
        (range(5, 105, 10), 105, False, None),
        (range(5, 115, 10), 106, False, "11 of the last 1000"),
        (range(5, 115, 10), 1200, False, None),
        (range(1, 20), 19, True, None),
        (range(1, 21), 20, True, "20 steps in a row"),
        (range(5, 115, 10), 106, True, None),
    ],
)
def test_skips_are_bounded(skipped: Sequence[int], step: int, fp16: bool, stops: str | None) -> None:
    reason = too_many_skips(list(skipped), step, fp16=fp16)
    assert (reason is None) if stops is None else (reason is not None and stops in reason)
