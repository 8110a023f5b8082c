"""The loss on a text, streamed as (sum, count): a fixed list of windows while training, any text or file afterwards.

Validation is the same on any number of ranks. `evaluate` slides a window over a text of any size in bounded memory and
scores each token once.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.windows import Windows, number_documents, stack
from smollm2.errors import ConfigError, DataError
from smollm2.inference.text_windows import CountedEncoder, Row, cut_rows, open_pieces
from smollm2.model.loss import next_token_loss
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import Runtime


@dataclass(frozen=True)
class Evaluation:
    """Totals over the targets that were scored: loss in nats, `text_bytes` the UTF-8 bytes they stand for."""

    loss_sum: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, by which different tokenizers compare."""
        return self.loss_sum / math.log(2) / self.text_bytes if self.text_bytes else math.nan


def spread(available: int, wanted: int) -> list[int]:
    """`wanted` indices, evenly spread over range(available); all of them where there are no more."""
    if available <= wanted:
        return list(range(available))
    return [index * available // wanted for index in range(wanted)]


def do_nothing() -> None:
    """The default of `stop`."""


@torch.inference_mode()
def score_windows(
    model: nn.Module,
    windows: Windows,
    indices: Sequence[int],
    bytes_per_token: np.ndarray,
    *,
    batch_size: int,
    stop: Callable[[], None] = do_nothing,
) -> Evaluation:
    """Score every target of these windows once; logits are never held for more than a chunk of tokens.

    `stop` is called before each batch and may raise.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    try:
        for start in range(0, len(indices), batch_size):
            stop()
            batch = stack([windows.read(index) for index in indices[start : start + batch_size]])
            loss, _ = model(*(torch.from_numpy(array).to(device) for array in batch if array is not None))
            targets = batch.labels[batch.labels != IGNORE_INDEX]
            loss_sum += loss.item()
            tokens += len(targets)
            text_bytes += int(bytes_per_token[targets].sum())
    finally:
        model.train(was_training)
    return Evaluation(loss_sum, tokens, text_bytes)


def evaluate_on_ranks(
    model: nn.Module,
    windows: Windows,
    indices: Sequence[int],
    bytes_per_token: np.ndarray,
    *,
    batch_size: int,
    runtime: Runtime,
) -> Evaluation:
    """`score_windows` with the list sliced over the ranks and the totals summed.

    Raises Interrupted on every rank, at the same batch, where one has received a signal.
    """
    mine = indices[runtime.rank :: runtime.world_size]
    runtime.pulse.mark("validation")
    with runtime.autocast():
        part = score_windows(
            model, windows, mine, bytes_per_token, batch_size=batch_size, stop=runtime.raise_if_stopped
        )
    most = len(indices[:: runtime.world_size])  # of windows, which rank 0 has
    for _ in range(math.ceil(most / batch_size) - math.ceil(len(mine) / batch_size)):
        runtime.raise_if_stopped()  # the ranks ask equally often
    if runtime.world_size == 1:
        return part
    totals = torch.tensor([part.loss_sum, part.tokens, part.text_bytes], dtype=torch.float64, device=runtime.device)
    loss_sum, tokens, text_bytes = runtime.sum(totals).tolist()
    return Evaluation(loss_sum, int(tokens), int(text_bytes))


@dataclass
class Ratio:
    """Sum of a over sum of b for parts of a text, and how sure it is: sums of squares are all that is kept."""

    parts: int = 0
    a: float = 0.0
    b: float = 0.0
    aa: float = 0.0
    ab: float = 0.0
    bb: float = 0.0

    def add(self, a: float, b: float) -> None:
        """One part more."""
        self.parts += 1
        self.a, self.b = self.a + a, self.b + b
        self.aa, self.ab, self.bb = self.aa + a * a, self.ab + a * b, self.bb + b * b

    @property
    def value(self) -> float:
        """The ratio."""
        return self.a / self.b if self.b else math.nan

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, the parts taken as independent (a ratio estimate); None for fewer than two parts."""
        if self.parts < 2 or not self.b:
            return None
        squares = max(0.0, self.aa - 2 * self.value * self.ab + self.value**2 * self.bb)
        error = math.sqrt(squares * self.parts / (self.parts - 1)) / self.b
        return self.value - 1.96 * error, self.value + 1.96 * error


def evaluate(
    model: SmolLM2,
    tokenizer: Tokenizer,
    text_or_path: str | Path,
    *,
    batch_size: int = 8,
    stride: int | None = None,
    separator: str | None = None,
    per_document: bool = False,
    document_mask: bool = False,
    report: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Loss (nats per token), perplexity and bits per byte of a text or a file (a Path; `-` is standard input), streamed.

    Windows are as long as the context and start every `stride` tokens (default: half of it), so that each token is scored
    once, with at least length - stride tokens before it where the text has them. Documents, where `separator` is between
    them, are read as in training: one stream, an end of text after each; its first token alone is not scored. With
    `per_document` each is scored alone, behind an end of text, and has its row in `documents`. With `document_mask`, as
    where it was on in training, a document sees nothing of another and its first token is not scored. The 95 % intervals
    take windows (or documents) as independent. Raises DataError for a text without a target or a file that cannot be read.
    """
    length = model.config.max_position_embeddings
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"a stride of {stride} is not possible in a context of {length} tokens; use 1 to {length}")
    counted = CountedEncoder(tokenizer)
    with tempfile.TemporaryDirectory() as spool:
        pieces = open_pieces(text_or_path, separator, Path(spool), report)
        rows = cut_rows(pieces, counted, length, stride, per_document=per_document)
        end_of_text = tokenizer.end_of_text if document_mask else None
        parts = score_rows(model, rows, tokenizer.bytes_per_token, end_of_text, batch_size=batch_size)
        documents = list(sum_documents(parts)) if per_document else []
        loss, bits = add_up(documents if per_document else (total for _, total in parts))
    if not loss.b:
        raise DataError(f"{text_or_path!s:.40} - it holds nothing to predict - name a longer text")
    return {
        "loss": loss.value,
        "loss_interval": loss.interval(),
        "perplexity": math.exp(min(loss.value, 700.0)),
        "perplexity_interval": exponentiate(loss.interval()),
        "bits_per_byte": bits.value,
        "bits_per_byte_interval": bits.interval(),
        "tokens": int(loss.b),
        "bytes": int(bits.b),
        "unexpressed_bytes": counted.unexpressed,
        "parts": loss.parts,
        "context": length,
        "stride": stride,
        **({"documents": [describe_document(total) for total in documents]} if per_document else {}),
    }


def describe_document(total: Evaluation) -> dict[str, float | int]:
    """The row of one document."""
    return {
        "loss": total.loss,
        "perplexity": math.exp(min(total.loss, 700.0)),
        "bits_per_byte": total.bits_per_byte,
        "tokens": total.tokens,
        "bytes": total.text_bytes,
    }


@torch.inference_mode()
def score_rows(
    model: SmolLM2, rows: Iterator[Row], bytes_per_token: np.ndarray, end_of_text: int | None, *, batch_size: int
) -> Iterator[tuple[int, Evaluation]]:
    """(document, totals) of each row, in order; logits are never held for more than a chunk of tokens. With `end_of_text`
    documents are isolated."""
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    while batch := list(islice(rows, batch_size)):
        longest = max(len(row.ids) for row in batch) - 1
        padded = np.array([row.ids[:-1] + [0] * (longest + 1 - len(row.ids)) for row in batch])
        numbers = None if end_of_text is None else torch.from_numpy(number_documents(padded, end_of_text)).to(device)
        hidden = model.model(torch.from_numpy(padded).to(device), numbers)
        for row, states in zip(batch, hidden, strict=True):
            scored = [at for at in range(row.context, len(row.ids) - 1) if row.ids[at] != end_of_text]
            targets = [row.ids[at + 1] for at in scored]
            loss, _ = next_token_loss(states[scored], model.lm_head.weight, torch.tensor(targets, device=device))
            yield row.document, Evaluation(loss.item(), len(targets), int(bytes_per_token[targets].sum()))
    model.train(was_training)


def sum_documents(parts: Iterable[tuple[int, Evaluation]]) -> Iterator[Evaluation]:
    """The totals of each document, in order."""
    for _, group in groupby(parts, key=lambda part: part[0]):
        found = [part for _, part in group]
        yield Evaluation(
            sum(part.loss_sum for part in found),
            sum(part.tokens for part in found),
            sum(part.text_bytes for part in found),
        )


def add_up(parts: Iterable[Evaluation]) -> tuple[Ratio, Ratio]:
    """Loss over tokens, and bits over bytes."""
    loss, bits = Ratio(), Ratio()
    for part in parts:
        loss.add(part.loss_sum, part.tokens)
        bits.add(part.loss_sum / math.log(2), part.text_bytes)
    return loss, bits


def exponentiate(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The same interval of the perplexity."""
    return None if interval is None else (math.exp(min(interval[0], 700.0)), math.exp(min(interval[1], 700.0)))
