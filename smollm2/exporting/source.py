"""What is exported: a model, its tokenizer, and what is known of its training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import CheckpointError
from smollm2.inference.loading import load_source, read_config
from smollm2.model.transformer import HEAD, SmolLM2


@dataclass(frozen=True)
class Source:
    """The model to export, its tokenizer, and facts about its training for the model card."""

    model: SmolLM2
    tokenizer: Tokenizer
    facts: Mapping[str, str]


def read_source(path: Path, *, best: bool, report: Callable[[str], None]) -> Source:
    """Return the model to export, with its tokenizer and what is known of its training. Raise CheckpointError."""
    model, tokenizer, state = load_source(path, best=best, report=report)
    if state is None:
        return Source(model, tokenizer, facts={})
    t = read_config(state, path).training
    facts = {
        "steps": f"{state['step']:,}",
        "tokens seen": f"{state['tokens']:,}",
        "training loss of the last step": f"{state['loss']:.4f} nats per token",
        "tokens per window": f"{t.sequence_length:,}",
        "windows per step": f"{t.batch_size * t.gradient_accumulation_steps:,}",
        "optimizer": f"{t.optimizer}, learning rate {t.learning_rate:g}, {t.schedule} schedule, {t.warmup_steps:,} warmup steps",
    }
    return Source(model, tokenizer, facts)


def check_shape(source: Source, path: Path) -> None:
    """Raise CheckpointError for a model that is neither Llama nor StableLM, or whose tokenizer has too many ids."""
    c = source.model.config
    width = c.num_attention_heads * c.head_dim
    if c.norm == "layernorm" and width != c.hidden_size:
        what = f"StableLM (with LayerNorm) needs heads with a total width of hidden_size ({c.hidden_size}), not {width}"
        raise CheckpointError(path, what, "train with norm: rmsnorm, or without head_dim")
    if source.tokenizer.vocab_size > c.vocab_size:
        what = f"the tokenizer has {source.tokenizer.vocab_size:,} ids, but the model has only {c.vocab_size:,}"
        raise CheckpointError(path, what, "export the model with the tokenizer it was trained with")


def check_range(weights: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> None:
    """Raise CheckpointError if a weight is not finite in this dtype, which the user calls `name`."""
    for key, tensor in weights.items():
        least, largest = tensor.aminmax()  # rounding keeps the order, and NaN propagates to both
        if not torch.stack((least, largest)).to(dtype).isfinite().all():
            what = f"a weight is outside the range of {name} ({tensor.abs().max().item():g})"
            raise CheckpointError(key, what, "export as float32 or bf16")


def exported_weights(model: SmolLM2) -> dict[str, Tensor]:
    """Return the weights by name, without a tied head, which shares the tensor of the embedding."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights[HEAD]
    return weights
