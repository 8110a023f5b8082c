"""Text from a model: one token after the other, each drawn from the distribution after those before it.

Prompts of different lengths are laid to end at the same column of one cache (model.extend). Each text has a generator
of its own, so that what stands beside it does not change what is drawn for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import DataError
from smollm2.inference.decoding import Decoder
from smollm2.inference.sampling import Sampling, sample
from smollm2.model.cache import COLUMN_STEP, KeyValueCache
from smollm2.model.transformer import SmolLM2


@dataclass(frozen=True)
class Piece:
    """What is new in one text: whole characters, and why it ended: `length`, `end_of_text`, `stop`, or "" if it goes on."""

    index: int
    text: str
    end: str


def generate(
    model: SmolLM2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, without the prompt, up to `max_new_tokens`, a stop string or the end of text.

    An empty prompt starts a new document. Temperature 0 takes the likeliest token. A prompt and its continuation may be
    longer than the context: the window slides. The result depends on (model, prompt, seed) alone, not on its neighbours
    nor on torch's random state. Raises ConfigError for an impossible setting, DataError for a prompt without ids.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    texts = [""] * len(prompts)
    for piece in stream(
        model, tokenizer, prompts, [seed] * len(prompts), max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
    ):
        texts[piece.index] += piece.text
    return texts


def stream(
    model: SmolLM2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    say: Callable[[str], None] = lambda message: None,
) -> Iterator[Piece]:
    """The pieces of all texts as they come. `say` hears where a prompt is cut and where a window slides."""
    rows = [
        Row(index, tokenizer, read_prompt(model, tokenizer, prompt, say), seed, max_new_tokens, stop)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if not rows or max_new_tokens < 1:
        return
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            cache, logits = prefill(model, rows)
            decoder = Decoder(model, compute_dtype(model.lm_head.weight), len(rows))
        while True:
            with torch.inference_mode():
                tokens = sample(logits, sampling, [row.ids for row in rows], [row.generator for row in rows])
            yield from (piece for row, token in zip(rows, tokens, strict=True) if (piece := row.append(token)))
            if all(row.end for row in rows):
                return
            with torch.inference_mode():
                if slide_windows(rows, model.config.max_position_embeddings, say) or cache.is_full:
                    cache, logits = prefill(model, rows)
                else:
                    logits = decoder.step(torch.tensor(tokens, device=logits.device), cache)
    finally:
        model.train(was_training)


class Row:
    """One text in the making: `ids` of prompt and continuation, of which the model sees those from `first` on."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt: list[int], seed: int, max_new_tokens: int, stop: Sequence[str]
    ) -> None:
        self.index, self.tokenizer, self.ids, self.prompt_length = index, tokenizer, list(prompt), len(prompt)
        self.limit = len(prompt) + max_new_tokens
        self.first, self.end = 0, ""
        self.generator = torch.Generator().manual_seed(seed)
        self.writer = Writer(tokenizer, stop)

    @property
    def window(self) -> list[int]:
        """What the model sees of it; of a text that has ended, no more than fills its place in the batch."""
        return self.ids[-1:] if self.end else self.ids[self.first :]

    def append(self, token: int) -> Piece | None:
        """Take the next token; what there is to show then."""
        if self.end:
            return None
        self.ids.append(token)
        if token == self.tokenizer.end_of_text:
            self.end = "end_of_text"
        elif len(self.ids) == self.limit:
            self.end = "length"
        text = self.writer.write(token if self.end != "end_of_text" else None, last=bool(self.end))
        if self.writer.stopped:
            self.end = "stop"
        return Piece(self.index, text, self.end) if text or self.end else None


class Writer:
    """Tokens to text, in whole characters, and nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, [word for word in stop if word]
        self.context: list[
            int
        ] = []  # tokens already written, which say how the next one reads: with a space or without
        self.unread: list[int] = []
        self.held = ""
        self.stopped = False

    def write(self, token: int | None, *, last: bool) -> str:
        """What can be shown after this token; at the last one all of it, half characters as U+FFFD."""
        self.unread += [] if token is None else [token]
        text = self.tokenizer.decode(self.context + self.unread)[len(self.tokenizer.decode(self.context)) :]
        if text.endswith("\ufffd") and not last:
            return ""  # perhaps half a character
        if text:
            self.context, self.unread = self.unread, []
        return self.find_stop(self.held + text, last=last)

    def find_stop(self, text: str, *, last: bool) -> str:
        """The text before the first stop string; an end that may become one is held back."""
        found = [place for word in self.stop if (place := text.find(word)) >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        longest = 0 if last else max((count_overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - longest :]
        return text[: len(text) - longest]


def count_overlap(text: str, word: str) -> int:
    """Characters at the end of `text` with which `word` begins."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def read_prompt(model: SmolLM2, tokenizer: Tokenizer, prompt: str, say: Callable[[str], None]) -> list[int]:
    """The ids of a prompt, its start cut off where it is longer than the context."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if max(ids) >= vocab_size:
        raise DataError(
            f"{tokenizer.name} - it gives id {max(ids)} and the model has {vocab_size} - use the model's own tokenizer"
        )
    if len(ids) > positions:
        say(
            f"the prompt has {len(ids)} tokens and the context {positions}: its first {len(ids) - positions} are left out"
        )
    return ids[-positions:]


def slide_windows(rows: Sequence[Row], positions: int, say: Callable[[str], None]) -> bool:
    """Drop the older half of each text that fills the context; whether there was one."""
    full = [row for row in rows if not row.end and len(row.ids) - row.first > positions]
    for row in full:
        row.first = len(row.ids) - max(positions // 2, 1)
        say(f"the context of {positions} tokens is full: from here on the model sees the last {positions // 2}")
    return bool(full)


def prefill(model: SmolLM2, rows: Sequence[Row]) -> tuple[KeyValueCache, Tensor]:
    """Read all windows into a new cache, with room for what will follow; logits (B, V) after the last tokens."""
    config, weight = model.config, model.lm_head.weight
    dtype = compute_dtype(weight)
    windows = [row.window for row in rows]
    longest = max(map(len, windows))
    step = COLUMN_STEP if dtype != torch.float32 else 1
    width = -(-longest // step) * step
    ahead = max(row.limit - len(row.ids) for row in rows if not row.end)
    columns = -(-(width + min(ahead, config.max_position_embeddings - longest)) // COLUMN_STEP) * COLUMN_STEP
    starts = torch.tensor([width - len(window) for window in windows], device=weight.device)
    shape = (config.num_hidden_layers, len(rows), config.num_key_value_heads, columns, config.head_dim)
    cache = KeyValueCache(starts, shape, dtype)
    ids = torch.tensor([[0] * (width - len(window)) + window for window in windows], device=weight.device)
    return cache, model.lm_head(model.model.extend(ids, cache)[:, -1])


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of keys and values: that of autocast, else that of the weights."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
