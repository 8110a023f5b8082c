"""Evaluate the loss as (sum, count): on fixed windows during training, on any text or file afterwards.

Validation gives the same loss on any number of ranks. `evaluate` slides a window over a text of any size, in bounded
memory, and scores each token once. `compare_evaluations` compares two models on the same text.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.sources import Rules
from smollm2.data.stream import MARK
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.windows import WindowSource, number_documents, stack
from smollm2.errors import ConfigError, DataError
from smollm2.inference.mode import evaluation_mode
from smollm2.inference.ratio import Ratio
from smollm2.inference.text_windows import CountedEncoder, TextWindow, chat_encoder, cut_windows, open_chunks
from smollm2.model.loss import next_token_loss
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import Runtime
from smollm2.runtime.sharding import free_gathered

PLAIN = Rules()

MAX_EXPONENT = 700.0
"""The largest argument passed to exp(); above about 709 the result overflows a double."""


@dataclass(frozen=True)
class Evaluation:
    """Totals over the scored targets: the loss in nats, the number of tokens, and the UTF-8 bytes that they encode."""

    loss_sum: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """The loss in nats per token."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, which does not depend on the tokenizer."""
        return self.loss_sum / math.log(2) / self.text_bytes if self.text_bytes else math.nan


def spread(available: int, wanted: int) -> list[int]:
    """Return `wanted` indices spread evenly over range(available); the whole range if it is not longer."""
    if available <= wanted:
        return list(range(available))
    return [index * available // wanted for index in range(wanted)]


@torch.no_grad()  # not inference mode: FSDP would keep its tensors for the next training step
def score_windows(
    model: nn.Module,
    windows: WindowSource,
    indices: Sequence[int],
    bytes_per_token: np.ndarray,
    *,
    batch_size: int,
    stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every target of these windows once, with the logits of only one chunk of tokens in memory at a time.

    `stop` is called before each batch and may raise.
    """
    device = next(model.parameters()).device
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    with evaluation_mode(model):
        for start in range(0, len(indices), batch_size):
            stop()
            batch = stack([windows.read(index) for index in indices[start : start + batch_size]])
            loss, _ = model(*(torch.from_numpy(array).to(device) for array in batch if array is not None))
            targets = batch.labels[batch.labels != IGNORE_INDEX]
            loss_sum += loss.item()
            tokens += len(targets)
            text_bytes += int(bytes_per_token[targets].sum())
    return Evaluation(loss_sum, tokens, text_bytes)


def evaluate_on_ranks(
    model: nn.Module,
    windows: WindowSource,
    indices: Sequence[int],
    bytes_per_token: np.ndarray,
    *,
    batch_size: int,
    runtime: Runtime,
) -> Evaluation:
    """Run `score_windows` with the windows divided among the ranks, and return the summed totals.

    Raise Interrupted on every rank, at the same batch, if one of them has received a signal.
    """
    mine = indices[runtime.rank :: runtime.world_size]
    runtime.pulse.mark("validation")
    with runtime.autocast():
        part = score_windows(
            model, windows, mine, bytes_per_token, batch_size=batch_size, stop=runtime.raise_if_stopped
        )
    most = len(indices[:: runtime.world_size])  # rank 0 has the most windows
    for _ in range(math.ceil(most / batch_size) - math.ceil(len(mine) / batch_size)):
        runtime.raise_if_stopped()  # every rank must check equally often
        if runtime.layout.is_sharded:  # and must take part in every forward pass
            token = torch.zeros(1, 1, dtype=torch.int64, device=runtime.device)
            with torch.no_grad(), runtime.autocast(), evaluation_mode(model):
                model(token, token)
    free_gathered(model)
    if runtime.world_size == 1:
        return part
    totals = torch.tensor([part.loss_sum, part.tokens, part.text_bytes], dtype=torch.float64, device=runtime.device)
    loss_sum, tokens, text_bytes = runtime.sum(totals).tolist()
    return Evaluation(loss_sum, int(tokens), int(text_bytes))


def evaluate(
    model: SmolLM2,
    tokenizer: Tokenizer,
    text_or_path: str | Path,
    *,
    context: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    separator: str | None = None,
    rules: Rules = PLAIN,
    per_document: bool = False,
    document_mask: bool = False,
    train_on: str = "assistant",
    keep_scores: bool = False,
    report: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Return loss (nats per token), perplexity and bits per byte of a text or a file (a Path; `-` is standard input).

    Windows have `context` tokens (default: the length the model was trained on) and start every `stride` tokens
    (default: half the context). `rules` say how files are read. Each token is scored once, with at least context - stride tokens before it if the text
    has them. Documents are separated by `separator` and read as in training: as one stream, with an end-of-text token
    after each; the very first token is not scored. With `per_document`, each document is scored separately, after an
    end-of-text token, and gets an entry in `documents`. With `document_mask`, as in training, documents do not attend
    to one another, and the first token of each is not scored. The 95 % intervals treat windows (or documents) as
    independent. Conversations are scored one by one, and of each what `data.train_on` names: the assistant's turns, or
    `all`. With `keep_scores`, the result includes `scores`, the totals of each window (or document), for
    `compare_evaluations`. Raise ConfigError for an impossible context or stride, DataError for a text without a target
    or an unreadable file.
    """
    length = choose_context(model, context)
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError("stride", f"{stride} is out of range for a context of {length} tokens", f"use 1 to {length}")
    with tempfile.TemporaryDirectory() as spool:
        chunks, is_chat = open_chunks(
            text_or_path, replace(rules, separator=separator or rules.separator), Path(spool), report
        )
        counted = CountedEncoder(chat_encoder(tokenizer, train_on, text_or_path) if is_chat else tokenizer)
        windows = cut_windows(chunks, counted, length, stride, per_document=per_document)
        end_of_text = tokenizer.document_end if document_mask and not is_chat else None
        scored = score_text(model, windows, tokenizer.bytes_per_token, end_of_text, batch_size=batch_size)
        parts = sum_documents(scored) if per_document or is_chat else (part for _, part in scored)
        kept = list(parts) if per_document or keep_scores else []
        loss, bits = add_up(kept or parts)
    if not loss.b:
        raise DataError(
            f"{text_or_path!s:.40}", "the text is too short: it has no token to predict", "use a longer text"
        )
    return {
        "loss": loss.value,
        "loss_interval": loss.interval(),
        "perplexity": perplexity(loss.value),
        "perplexity_interval": exponentiate(loss.interval()),
        "bits_per_byte": bits.value,
        "bits_per_byte_interval": bits.interval(),
        "tokens": int(loss.b),
        "bytes": int(bits.b),
        "unencodable_bytes": counted.unencodable_bytes,
        "parts": loss.parts,
        "unit": "conversations" if is_chat else "documents" if per_document else "windows",
        "context": length,
        "stride": stride,
        **({"documents": [describe_document(part) for part in kept]} if per_document else {}),
        **({"scores": kept} if keep_scores else {}),
    }


def choose_context(model: SmolLM2, context: int | None) -> int:
    """Return `context`, by default the training length. Raise ConfigError if the model has fewer positions."""
    positions = model.config.max_position_embeddings
    if context is None:
        return min(model.trained_length, positions)
    if not 1 <= context <= positions:
        raise ConfigError(
            "context", f"{context} is out of range: the model has {positions} positions", f"use 1 to {positions}"
        )
    return context


def describe_document(total: Evaluation) -> dict[str, float | int]:
    """Return a document's entry in the result of `evaluate`."""
    return {
        "loss": total.loss,
        "perplexity": perplexity(total.loss),
        "bits_per_byte": total.bits_per_byte,
        "tokens": total.tokens,
        "bytes": total.text_bytes,
    }


@dataclass(frozen=True)
class Comparison:
    """The difference between two evaluations in bits per byte: second minus first, so below 0 the second is better.

    `interval` is the 95 % interval of the mean difference over `parts` pairs of windows (or documents), or None for a
    single pair.
    """

    difference: float
    interval: tuple[float, float] | None
    parts: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def compare_evaluations(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison | None:
    """Compare two results of `evaluate` with `keep_scores` on the same text, window by window (or by document).

    Both results of a pair score the same text, so the interval is much narrower than those of the two losses. Return
    None if the pairs do not match because of a different tokenizer (then use `per_document`), context or stride.
    """
    pairs = list(zip(first["scores"], second["scores"], strict=False))
    if len(first["scores"]) != len(second["scores"]) or any(a.text_bytes != b.text_bytes for a, b in pairs):
        return None
    ratio = Ratio()
    for a, b in pairs:
        ratio.add((b.loss_sum - a.loss_sum) / math.log(2), a.text_bytes)
    return Comparison(ratio.value, ratio.interval(), ratio.parts) if ratio.b else None


@torch.inference_mode()
def score_text(
    model: SmolLM2,
    windows: Iterator[TextWindow],
    bytes_per_token: np.ndarray,
    end_of_text: int | None,
    *,
    batch_size: int,
) -> Iterator[tuple[int, Evaluation]]:
    """Yield (document number, totals) of each window, with the logits of only one chunk of tokens in memory at a time.

    If `end_of_text` is given, documents do not attend to one another.
    """
    device = model.lm_head.weight.device
    with evaluation_mode(model):
        while batch := list(islice(windows, batch_size)):
            longest = max(len(window.ids) for window in batch) - 1
            padded = np.array([window.ids[:-1] + [0] * (longest + 1 - len(window.ids)) for window in batch]) % MARK
            numbers = (
                None if end_of_text is None else torch.from_numpy(number_documents(padded, end_of_text)).to(device)
            )
            hidden = model.model(torch.from_numpy(padded).to(device), numbers)
            for window, states in zip(batch, hidden, strict=True):
                pairs = enumerate(pairwise(window.ids))
                scored = [n for n, (i, target) in pairs if n >= window.context and i != end_of_text and target < MARK]
                targets = [window.ids[n + 1] for n in scored]
                loss, _ = next_token_loss(states[scored], model.lm_head.weight, torch.tensor(targets, device=device))
                yield window.document, Evaluation(loss.item(), len(targets), int(bytes_per_token[targets].sum()))


def sum_documents(parts: Iterable[tuple[int, Evaluation]]) -> Iterator[Evaluation]:
    """Yield the totals of each document, in order."""
    for _, group in groupby(parts, key=lambda part: part[0]):
        found = [part for _, part in group]
        yield Evaluation(
            sum(part.loss_sum for part in found),
            sum(part.tokens for part in found),
            sum(part.text_bytes for part in found),
        )


def add_up(parts: Iterable[Evaluation]) -> tuple[Ratio, Ratio]:
    """Return two ratios over all parts: loss to tokens, and bits to bytes."""
    loss, bits = Ratio(), Ratio()
    for part in parts:
        loss.add(part.loss_sum, part.tokens)
        bits.add(part.loss_sum / math.log(2), part.text_bytes)
    return loss, bits


def perplexity(loss: float) -> float:
    """Return exp(loss), limited so that it does not overflow."""
    return math.exp(min(loss, MAX_EXPONENT))


def exponentiate(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the perplexity interval that corresponds to a loss interval."""
    return None if interval is None else (perplexity(interval[0]), perplexity(interval[1]))
