"""The weights from which a run starts: those of another model, with rows for added tokens."""

from pathlib import Path

import torch

from smollm2.config.initial_model import OWN_KEYS, find_model_folder
from smollm2.config.schema import ModelConfig
from smollm2.data.corpus import load_initial_tokenizer
from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import CheckpointError
from smollm2.inference.loading import load_source
from smollm2.model.transformer import Linear, SmolLM2

NOISE = 0.01
"""The spread of new rows around the mean, as a share of the spread of the old rows: enough to tell them apart."""


def load_initial_model(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> SmolLM2:
    """Return the model from which a run starts, in training mode, with a row for each id of the tokenizer.

    Raise CheckpointError if it does not have the shape of the config.
    """
    assert config.init_from is not None
    model, _, _ = load_source(Path(find_model_folder(config.init_from)))
    first = load_initial_tokenizer(config.init_from).vocab_size
    check_same_shape(config, model.config)
    if tokenizer.vocab_size > first:
        add_rows(model, first, config.vocab_size, seed)
    model.config, model.trained_length = config, config.max_position_embeddings
    return model.train()


def check_same_shape(wanted: ModelConfig, found: ModelConfig) -> None:
    """Raise CheckpointError if the model to start from is no longer the one that the config was made for."""
    for name in ModelConfig.model_fields.keys() - OWN_KEYS - {"vocab_size"}:
        if getattr(wanted, name) != getattr(found, name):
            what = f"{name} is {getattr(found, name)}, but the config has {getattr(wanted, name)}"
            raise CheckpointError(str(wanted.init_from), what, "start again from the model's own config")


@torch.no_grad()
def add_rows(model: SmolLM2, first: int, size: int, seed: int) -> None:
    """Give the embedding and the head `size` rows; from `first` on they are near the mean of the rows before.

    A head that is tied to the embedding stays tied.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[torch.nn.Embedding | Linear] = [model.model.embed_tokens]
    parts += [] if model.config.tie_word_embeddings else [model.lm_head]
    for part in parts:
        old = part.weight[:first]
        new = torch.empty(size, old.shape[1])
        new[:first] = old
        noise = torch.randn(size - first, old.shape[1], generator=generator)
        new[first:] = old.mean(0) + NOISE * old.std(0) * noise
        part.weight = torch.nn.Parameter(new)
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = size
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
