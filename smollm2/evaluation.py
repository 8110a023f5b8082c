"""Validation loss over a fixed list of windows: streamed as (sum, count), the same on any number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from smollm2.data.windows import Windows
from smollm2.errors import DataError
from smollm2.loss import IGNORED
from smollm2.model import SmolLM2
from smollm2.runtime import Runtime
from smollm2.tokenizer import Tokenizer


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
            rows = [windows.read(index) for index in indices[start : start + batch_size]]
            input_ids, labels = (np.stack(arrays) for arrays in zip(*rows, strict=True))
            loss, _ = model(torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device))
            targets = labels[labels != IGNORED]
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


def evaluate(
    model: SmolLM2, tokenizer: Tokenizer, text_or_path: str | Path, *, batch_size: int = 8
) -> dict[str, float | int]:
    """Loss (nats per token), perplexity, bits per byte and the number of tokens scored, of a text or of a file (a Path).

    Windows are as long as the context and overlap by half, so that each token but the first is scored once, with at
    least half a context before it. Raises DataError for a text of fewer than two tokens or a file that cannot be read.
    """
    text = read_text(text_or_path) if isinstance(text_or_path, Path) else text_or_path
    length = model.config.max_position_embeddings
    tokens = np.asarray([*tokenizer.encode(text), tokenizer.end_of_text])
    windows = Windows(tokens, length, max(1, length // 2), model.config.vocab_size)
    found = score_windows(model, windows, range(len(windows)), tokenizer.bytes_per_token, batch_size=batch_size)
    return {
        "loss": found.loss,
        "perplexity": math.exp(found.loss),
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
    }


def read_text(path: Path) -> str:
    """A whole UTF-8 file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
