"""Faults as they were found in public training code (or nearly were), planted in ours; each names the check that must see it.

docs/doctor.md prints the table (scripts/write_doctor_docs.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.data import batches, store, windows
from smollm2.model import functional, transformer
from smollm2.training import optim, progress, resume, step, step_checks, twin
from smollm2.training.setup import Run

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Sabotage:
    """A fault, the check that names it, and how it is planted: in the code before the run is built, or in the run."""

    fault: str
    check: str
    plant: Callable[[Patch], None] = lambda patch: None
    change: Callable[[Run], Run] = lambda run: run
    flags: tuple[tuple[str, str], ...] = ()
    verdict: str = "fail"


def replaces(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Plant `make(original)` in place of an attribute."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def attends(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Patch], None]:
    """Plant another attention."""
    return lambda patch: patch.setattr(transformer, "attend", lambda q, k, v, backend, layout: formula(q, k, v))


def across_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return turned.transpose(1, 2)


def whole_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def one_too_many(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def labels_become(make: Callable[[windows.Batch, Any], np.ndarray]) -> Callable[[Patch], None]:
    """Plant other labels in every window of the text."""

    def change(read: Any) -> Any:
        def wrong(self: Any, i: int) -> windows.Batch:
            window: windows.Batch = read(self, i)
            return window._replace(labels=make(window, self))

        return wrong

    return replaces(windows.TokenWindows, "read", change)


def masks_ends(window: windows.Batch, source: Any) -> np.ndarray:
    end = int(source.tokens[len(source.tokens) - 1 : len(source.tokens)][0])
    return np.where(window.labels == end, -100, window.labels)


def shifted_again(loss: Any) -> Any:
    def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Any:
        return loss(hidden[:, :-1], weight, labels[:, 1:], **options)

    return wrong


def counts_all(loss: Any) -> Any:
    def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Any:
        total, _ = loss(hidden, weight, labels, **options)
        return total, torch.tensor(labels.numel())

    return wrong


def untied(initialize: Any) -> Any:
    def wrong(self: Any, generator: Any = None) -> None:
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach().clone())
        initialize(self, generator)

    return wrong


def block_forward(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    return replaces(transformer.Block, "forward", change)


def skips_half(forward: Any) -> Any:
    return lambda self, x, *rest: x + self.self_attn(self.input_layernorm(x), *rest) + 0 * self.mlp(x)


def detaches(forward: Any) -> Any:
    return lambda self, x, *rest: forward(self, x.detach(), *rest)


def mixes_batch(forward: Any) -> Any:
    return lambda self, x, *rest: forward(self, x + 0.01 * x.mean(0, keepdim=True), *rest)


def drops_out(forward: Any) -> Any:
    return lambda self, x, *rest: F.dropout(forward(self, x, *rest), 0.1, training=True)


def too_large(initialize: Any) -> Any:
    def wrong(self: Any, generator: Any = None) -> None:
        initialize(self, generator)
        for p in self.parameters():
            p.data.mul_(30)

    return wrong


def scaled_again(unscale: Any) -> Any:
    def wrong(self: Any, optimizer: Any) -> None:
        unscale(self, optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad *= self.get_scale()

    return wrong


def in_bf16(norm: Any) -> Any:
    return lambda x, weight, eps: norm(x.bfloat16(), weight, eps).to(x.dtype)


def rounded(tables: Any) -> Any:
    return lambda *sizes: tuple(table.bfloat16().float() for table in tables(*sizes))


def wrong_slope(backward: Any) -> Any:
    def wrong(ctx: Any, grad: Tensor) -> Any:
        at_x, at_weight, none = backward(ctx, grad)
        return 0.5 * at_x, at_weight, none

    return staticmethod(wrong)


def divides_twice(accumulate: Any) -> Any:
    def wrong(model: Any, micro_batches: Any, runtime: Any, **options: Any) -> Any:
        found = accumulate(model, micro_batches, runtime, **options)
        for p in model.parameters():
            p.grad /= len(micro_batches)
        return found

    return wrong


def mean_of_means(accumulate: Any) -> Any:
    def wrong(model: Any, micro_batches: Any, runtime: Any, **options: Any) -> Any:
        losses: list[Tensor] = []
        tokens = 0
        for one in micro_batches:
            loss, count = accumulate(model, [one], runtime, **options)
            losses, tokens = [*losses, loss], tokens + count
        for p in model.parameters():
            p.grad /= len(micro_batches)
        return torch.stack(losses).mean(), tokens

    return wrong


def only_first(split: Any) -> Any:
    def wrong(*arguments: Any) -> Any:
        parts = split(*arguments)
        return [parts[0]] * len(parts)

    return wrong


def rates(wrong: Callable[[Any, int, Any], float]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        right = optim.learning_rate_at
        patch.setattr(step_checks, "learning_rate_at", lambda at, config: wrong(right, at, config))

    return plant


def per_rank(right: Any, at: int, config: Any) -> float:
    return float(right(min(4 * at, config.train_steps - 1), config))


def decays_all(groups: Any) -> Any:
    return lambda parameters, config: [{"params": list(parameters.items()), "weight_decay": config.weight_decay}]


def climbs(train_step: Any) -> Any:
    def wrong(*arguments: Any, learning_rate: float, **options: Any) -> Any:
        return train_step(*arguments, learning_rate=-learning_rate, **options)

    return wrong


def trains_on_validation(patch: Patch) -> None:
    def copied(self: Any) -> Any:
        return self.train[0:400]

    patch.setattr(store.TokenStore, "validation", property(copied))


def one_order(permute: Any) -> Any:
    return lambda index, size, key: permute(index, size, np.uint64(7))


def with_frozen(run: Run) -> Run:
    next(iter(run.model.model.layers.parameters())).requires_grad_(False)
    return run


def with_another_tokenizer(run: Run) -> Run:
    run.tokenizer.fingerprint = "0" * 64
    return run


ISOLATED = (("data.document_mask", "true"),)

SABOTAGES = [
    Sabotage("q, k, v in another layout: attention runs across heads", "past", attends(across_heads)),
    Sabotage("no causal mask", "causality", attends(F.scaled_dot_product_attention)),
    Sabotage("a causal mask that is off by one", "causality", attends(one_too_many)),
    Sabotage("labels are not shifted", "next token", labels_become(lambda window, source: window.input_ids)),
    Sabotage("labels are not shifted, seen in the text", "targets", labels_become(lambda window, _: window.input_ids)),
    Sabotage("labels are shifted twice", "loss", replaces(transformer, "next_token_loss", shifted_again)),
    Sabotage(
        "labels are shifted twice, seen in training",
        "next token",
        replaces(transformer, "next_token_loss", shifted_again),
    ),
    Sabotage("ignored labels are counted", "loss", replaces(transformer, "next_token_loss", counts_all)),
    Sabotage(
        "rotary tables are built and not applied",
        "positions",
        replaces(transformer, "rotate", lambda _: lambda x, *_: x),
    ),
    Sabotage(
        "positions are applied twice",
        "reference",
        replaces(transformer, "rotate", lambda rotate: lambda x, *tables: rotate(rotate(x, *tables), *tables)),
    ),
    Sabotage("positions in bf16", "reference", replaces(transformer, "rotary_tables", rounded)),
    Sabotage("a norm in bf16", "reference", replaces(transformer, "rms_norm", in_bf16)),
    Sabotage(
        "a wrong derivative", "finite differences", replaces(functional.RMSNormSavingMemory, "backward", wrong_slope)
    ),
    Sabotage("weights tied in name only", "parameters", replaces(transformer.SmolLM2, "initialize", untied)),
    Sabotage("a layer whose output is not used", "gradients", block_forward(skips_half)),
    Sabotage("a frozen parameter", "gradients", change=with_frozen),
    Sabotage("a detached residual stream", "gradients", block_forward(detaches)),
    Sabotage("sequences of a batch are mixed", "batch", block_forward(mixes_batch)),
    Sabotage("dropout in evaluation", "evaluation", block_forward(drops_out)),
    Sabotage(
        "documents of a window see each other",
        "documents",
        attends(whole_window),
        flags=ISOLATED,
    ),
    Sabotage(
        "weights that are drawn too large",
        "initial loss",
        replaces(transformer.SmolLM2, "initialize", too_large),
        verdict="warn",
    ),
    Sabotage("every micro-batch is the first one", "micro-batches", replaces(step_checks, "split", only_first)),
    Sabotage("the loss is divided twice", "accumulation", replaces(step, "accumulate_gradients", divides_twice)),
    Sabotage(
        "the mean of the micro-batches' means", "accumulation", replaces(step, "accumulate_gradients", mean_of_means)
    ),
    Sabotage("clipping before unscaling", "loss scale", replaces(torch.amp.GradScaler, "unscale_", scaled_again)),
    Sabotage(
        "clipping by the largest gradient",
        "clipping",
        replaces(torch.nn.utils, "get_total_norm", lambda _: lambda grads: max(grad.norm() for grad in grads)),
    ),
    Sabotage("a schedule that steps once per rank", "learning rates", rates(per_rank)),
    Sabotage(
        "a lambda that returns an absolute rate",
        "learning rates",
        rates(lambda right, at, config: right(at, config) ** 2),
    ),
    Sabotage(
        "no warmup", "learning rates", rates(lambda right, at, config: right(max(at, config.warmup_steps), config))
    ),
    Sabotage("weight decay on every parameter", "weight decay", replaces(optim, "_decay_groups", decays_all)),
    Sabotage(
        "an optimizer that misses a group",
        "updates",
        replaces(optim, "_decay_groups", lambda groups: lambda *two: groups(*two)[:1]),
    ),
    Sabotage("updates uphill", "overfit", replaces(twin, "train_step", climbs)),
    Sabotage("validation text inside the training text", "validation", trains_on_validation),
    Sabotage("end-of-text masked as padding", "ends", labels_become(masks_ends)),
    Sabotage("tokens of another tokenizer in the cache", "tokenizer", change=with_another_tokenizer),
    Sabotage(
        "a part of the text is never read",
        "coverage",
        replaces(windows.Windows, "__len__", lambda length: lambda self: 1 + length(self) // 28),
    ),
    Sabotage("every epoch in the same order", "order", replaces(batches, "permute", one_order)),
    Sabotage(
        "a resume without the optimizer's state",
        "save",
        replaces(resume, "load_optimizer_states", lambda _: lambda *two: None),
    ),
    Sabotage(
        "a resume without the random state",
        "save",
        replaces(step_checks, "restore_random_state", lambda _: lambda state: None),
    ),
    Sabotage(
        "a resume without the position in the data",
        "save",
        replaces(progress.Progress, "from_state", lambda _: lambda state: progress.Progress()),
    ),
]
