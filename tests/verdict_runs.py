"""Ten short real runs for the verdicts: six that are sick, by one fault in the real code or one wrong setting, and four that
are sound."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from runs import tiny_config, write_tiny
from torch import Tensor

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.windows import Batch, TokenWindows
from smollm2.model import transformer
from smollm2.training import setup
from smollm2.training.loop import train

CONFIG = """
model: {hidden_size: 64, intermediate_size: 160, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
  max_position_embeddings: 64, norm: rmsnorm}
training: {train_steps: 300, batch_size: 8, gradient_accumulation_steps: 1, learning_rate: 3e-3, warmup_steps: 30,
  precision: float32, log_interval: 10, eval_interval: 50, eval_windows: 16, save_interval: 0, sample_interval: 100,
  sample_tokens: 32, sample_prompts: [The], preflight: false}
data: {tokenizer: bytes, validation_fraction: 0.1}
"""

Patch = Callable[[pytest.MonkeyPatch], None]


def remove_mask(patch: pytest.MonkeyPatch) -> None:
    """Let every position attend to all others."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    patch.setattr(transformer, "attend", attend)


def remove_shift(patch: pytest.MonkeyPatch) -> None:
    """Let each token be its own target."""
    read = TokenWindows.read

    def read_unshifted(self: TokenWindows, i: int) -> Batch:
        ids, labels, documents = read(self, i)
        labels[labels != IGNORE_INDEX] = ids[labels != IGNORE_INDEX]
        return Batch(ids, labels, documents)

    patch.setattr(TokenWindows, "read", read_unshifted)


def freeze_embeddings(patch: pytest.MonkeyPatch) -> None:
    """Leave the embedding out of training."""
    build = setup.build_model

    def build_frozen(*given: Any) -> transformer.SmolLM2:
        model = build(*given)
        model.model.embed_tokens.weight.requires_grad_(False)
        return model

    patch.setattr(setup, "build_model", build_frozen)


def change_nothing(patch: pytest.MonkeyPatch) -> None:
    """A sound run."""


@cache
def natural_text() -> str:
    """A megabyte of the source of Python's own modules, which people wrote."""
    modules = sorted(Path(json.__file__).parents[1].glob("*.py"))
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in modules[:80])[: 10**6]


@dataclass(frozen=True)
class Case:
    """One run: the problem that names it, or none, its fault, its text and its settings."""

    verdict: str
    fault: Patch = change_nothing
    text: Callable[[], str] = natural_text
    flags: dict[str, object] = field(default_factory=dict)


MUON = {"training__optimizer": "muon", "training__learning_rate": 6e-3, "training__schedule": "linear"}

CASES = {
    "rate 30 times too high": Case("learning rate", flags={"training__learning_rate": 0.09}),
    "no mask": Case("leak", remove_mask, flags=MUON),
    "no shift": Case("leak", remove_shift),
    "a tiny corpus repeated": Case(
        "overfitting", text=lambda: natural_text()[:4000], flags={**MUON, "training__eval_interval": 25}
    ),
    "all zeros": Case("one token", text=lambda: "\0" * 50_000),
    "frozen embeddings": Case("untrained", freeze_embeddings),
    "adamw": Case(""),
    "muon": Case("", flags=MUON),
    "every step": Case(
        "", flags={"training__log_interval": 1, "training__batch_size": 2, "training__eval_interval": 10}
    ),
    "tokens": Case(
        "",
        flags={
            "data__tokenizer": "auto",
            "model__vocab_size": 2000,
            "training__schedule": "wsd",
            "training__warmup_steps": 100,
            "data__pack": "windows",
        },
    ),
}


def verdicts_of(folder: Path) -> list[dict[str, Any]]:
    """The verdicts in a run folder."""
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "verdict"]


def run_case(
    case: Case, folder: Path, patch: pytest.MonkeyPatch, *, is_long: bool = True, **flags: object
) -> list[dict[str, Any]]:
    """Return the verdicts of a run; one that is not long reads a tenth of the text."""
    write_tiny(folder, text=case.text()[: 10**6 if is_long else 10**5], config=CONFIG)
    case.fault(patch)
    train(tiny_config(folder, **{**case.flags, **flags}), quiet=True)
    return verdicts_of(folder / "checkpoints")
