"""Compare tokenizers on a text: how many bytes a token stands for, and what the embedding costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from smollm2.config.schema import Config
from smollm2.data.corpus import Listener, Tokenized, find_tokenizer, open_data_input
from smollm2.data.documents import Source
from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import DataError
from smollm2.plan.arithmetic import count_non_embedding, count_parameters

SAMPLE = 5_000_000
"""Bytes of the text on which each tokenizer is measured, spread evenly over it."""


@dataclass(frozen=True)
class TokenizerMeasure:
    """A tokenizer, on a sample of the text, in the model of a config with its vocabulary."""

    name: str
    vocab_size: int
    bytes_per_token: float
    unknown_share: float  # of the bytes
    parameters: int
    embedding_share: float  # of the parameters, the head included

    def describe(self) -> str:
        """Return the measures in one line."""
        return (
            f"{self.vocab_size:,} ids, {self.bytes_per_token:.2f} bytes per token, {self.unknown_share:.2%} unencodable; "
            f"{self.parameters:,} parameters, {self.embedding_share:.0%} of them in embeddings"
        )


def compare_tokenizers(config: Config, names: Sequence[str], listener: Listener) -> list[TokenizerMeasure]:
    """Return the measures of each tokenizer, named as in data.tokenizer, on the text of the config.

    Raise DataError or ConfigError if the text cannot be read or a tokenizer cannot be loaded.
    """
    sources = []
    for name in config.data.inputs:
        source = open_data_input(config, name, listener)
        if isinstance(source, Tokenized):
            raise DataError(name, "these are tokens already: there is no text to compare tokenizers on", "name a text")
        sources.append(source)
    named = [config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": name})}) for name in names]
    tokenizers = [find_tokenizer(one, sources, listener) for one in named]
    return [measure(config, name, t, sources, listener.stop) for name, t in zip(names, tokenizers, strict=True)]


def measure(
    config: Config, name: str, tokenizer: Tokenizer, sources: Sequence[Source], stop: Callable[[], None]
) -> TokenizerMeasure:
    """Return the measures of one tokenizer."""
    size = tokens = unknown = 0
    for text in sample(sources, stop):
        ids, lost = tokenizer.encode_counted(text)
        size, tokens, unknown = size + len(text.encode()), tokens + len(ids), unknown + lost
    model = config.with_vocab_size(tokenizer.vocab_size).model
    parameters = count_parameters(model)
    embedding_share = 1 - count_non_embedding(model) / parameters
    return TokenizerMeasure(
        name, tokenizer.vocab_size, size / max(1, tokens), unknown / size, parameters, embedding_share
    )


def sample(sources: Sequence[Source], stop: Callable[[], None]) -> Iterator[str]:
    """Yield the same share of each source, evenly spread."""
    for source in sources:
        yield from source.sample(SAMPLE // len(sources), stop)
