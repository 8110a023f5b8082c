"""`smollm2 verify` on sound models of many kinds, none of which may raise an alarm, and on faults that look like one of them."""

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from analysis.foreign_model import GPT, loss
from torch import Tensor, nn
from torch.nn import functional as F

from smollm2.analysis.checks import Result, describe_result, run_checks
from smollm2.analysis.foreign import Foreign, check_batches, list_foreign_checks, make_foreign
from smollm2.analysis.probe import Probe

LLAMA = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of_transformers(kind: str, **changes: Any) -> nn.Module:
    """A model of transformers with random weights."""
    import transformers

    torch.manual_seed(0)
    from_config: Any = transformers.AutoModelForCausalLM.from_config
    model: nn.Module = from_config(transformers.AutoConfig.for_model(kind, **{**LLAMA, **changes}))
    return model


class Changed(GPT):
    """The small GPT with something done to its logits."""

    def __init__(self, change: Callable[["Changed", Tensor], Tensor], **sizes: int) -> None:
        super().__init__(**sizes)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        return self.change(self, super().forward(ids))


class LongOnly(GPT):
    """A model that refuses short inputs."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] < 100:
            raise ValueError("give 100 tokens or more")
        return super().forward(ids)


class In16Bits(GPT):
    """A model that chooses its own precision."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(ids).float()


def from_zero() -> nn.Module:
    """Projections and head that begin at zero, as in nanochat and with muP."""
    model = GPT()
    for name, parameter in model.named_parameters():
        if "out_proj" in name or "linear2" in name or "head" in name:
            nn.init.zeros_(parameter)
    return model


def uncopyable() -> nn.Module:
    """A model that deepcopy refuses."""
    model = GPT()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def excluded(model: nn.Module, logits: Tensor) -> Tensor:
    """Logits of minus infinity for the padding of the vocabulary."""
    return logits.masked_fill(torch.arange(logits.shape[-1]) >= 90, -math.inf)


SOUND: dict[str, Callable[[], nn.Module]] = {
    "bf16": lambda: GPT().to(torch.bfloat16),
    "fp16": lambda: GPT().to(torch.float16),
    "float64": lambda: GPT().double(),
    "autocast inside": In16Bits,
    "a vocabulary of two": lambda: GPT(vocab_size=2),
    "32 positions": lambda: GPT(length=32),
    "more positions than ids": lambda: GPT(vocab_size=50, length=128),
    "long inputs only": lambda: LongOnly(length=128),
    "projections from zero": from_zero,
    "excluded ids": lambda: Changed(excluded),
    "functional dropout": lambda: Changed(lambda model, x: F.dropout(x, 0.1, model.training)),
    "no copies": uncopyable,
    "a short window": lambda: of_transformers("mistral", sliding_window=4),
    "experts": lambda: of_transformers("mixtral", num_local_experts=8),
    "a padding id": lambda: of_transformers("gemma", head_dim=8),
}


def results_of(model: nn.Module) -> dict[str, Result]:
    """The results of all checks by name."""
    foreign = make_foreign(model, of_any if hasattr(model, "config") else loss)
    return {one.name: one for one in run_checks(list_foreign_checks(foreign))}


def of_any(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a model of transformers."""
    found: Tensor = model(ids, labels=ids).loss
    return found


QUICK = ("fp16", "a vocabulary of two", "projections from zero", "32 positions")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in SOUND]
)
def test_a_sound_model_raises_no_alarm(kind: str) -> None:
    results = results_of(SOUND[kind]())
    assert [describe_result(one) for one in results.values() if one.verdict in ("warn", "fail")] == []
    assert {"causality", "past", "batch", "gradients"} <= {n for n, one in results.items() if one.verdict == "pass"}


def dead_layer() -> nn.Module:
    model = GPT()
    model.extra = nn.Linear(3, 3)
    return model


def in_another_layout() -> nn.Module:
    """Attention whose heads are blocks of positions, which reach to the end of their block only."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.mixed, self.head = nn.Embedding(50, 24), nn.Linear(24, 24), nn.Linear(24, 50)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            heads = self.mixed(x).view(len(ids), 3, ids.shape[1], 8)  # no transpose
            x = x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).reshape(x.shape)
            out: Tensor = self.head(x)
            return out

    return Blocks()


@pytest.mark.parametrize(
    ("build", "check"),
    [
        (lambda: Changed(lambda model, x: x * math.nan), "causality"),
        (lambda: Changed(lambda model, x: x * math.inf), "past"),
        (dead_layer, "gradients"),
        (in_another_layout, "past"),
    ],
)
def test_a_fault_is_not_taken_for_a_kind_of_model(build: Callable[[], nn.Module], check: str) -> None:
    assert results_of(build())[check].verdict == "fail"


def test_a_wrong_derivative_is_not_taken_for_a_kink() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 1.1

    model = Changed(lambda model, x: Wrong.apply(x))  # type: ignore[no-untyped-call]
    assert results_of(model)["finite differences"].verdict == "fail"


def test_frozen_parameters_of_another_model_are_a_warning() -> None:
    model = GPT()
    model.tokens.weight.requires_grad_(False)
    found = results_of(model)["gradients"]
    assert found.verdict == "warn" and "tokens.weight is frozen" in describe_result(found)


def test_batches_may_be_arrays_of_numpy() -> None:
    def batches() -> Iterator[dict[str, Any]]:
        for seed in range(2):
            ids = np.random.default_rng(seed).integers(0, 97, (2, 9))
            yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    assert check_batches(make_foreign(GPT(), None, batches())).verdict == "pass"


@pytest.mark.parametrize("size", [2, 3, 4, 97])
def test_the_other_id_is_another_one(size: int) -> None:
    probe = Probe(nn.Identity(), size, torch.device("cpu"), 8, lambda ids, _: ids)
    ids = torch.arange(size)
    assert not (probe.other(ids) == ids).any() and set(probe.other(ids).tolist()) == set(range(size))


def test_a_padding_id_is_never_drawn() -> None:
    foreign: Foreign = make_foreign(of_transformers("gemma", head_dim=8))
    assert foreign.probe.padding_id == 0 and (foreign.probe.draw(50) != 0).all()
