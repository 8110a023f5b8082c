"""Generate text one token at a time, each sampled from the model's distribution given the tokens before it.

Prompts of different lengths are left-padded into one key-value cache (Transformer.extend). Each sequence has its own
random generator, so the other sequences of a batch do not affect its samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import DataError
from smollm2.inference.decoding import Decoder
from smollm2.inference.mode import evaluation_mode
from smollm2.inference.sampling import Sampling, sample
from smollm2.model.cache import COLUMN_STEP, KeyValueCache
from smollm2.model.transformer import SmolLM2

Prompt = str | Sequence[int]

SEEDS = 2**63
"""The exclusive upper bound of seeds."""


@dataclass(frozen=True)
class Piece:
    """Newly generated text of the continuation number `index`, in whole characters.

    `end` says why the continuation ended (`length`, `end_of_text` or `stop`); it is empty if more text follows.
    """

    index: int
    text: str
    end: str


def generate(
    model: SmolLM2,
    tokenizer: Tokenizer,
    prompts: str | Sequence[Prompt],
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
    """Return each prompt's continuation, without the prompt, up to `max_new_tokens`, a stop string or an end of text.

    A prompt is a text, or its token ids. A single string counts as a list of one prompt. An empty prompt starts a new document. Temperature 0 selects the
    most likely token. If the text grows longer than the context, the context window slides. Prompt number i uses the
    seed `seed + i`: its text depends only on the model, the settings, the prompt and that seed, not on the other
    prompts or on torch's random state. Raise ConfigError for an impossible setting, DataError if a prompt cannot be
    encoded with the model's ids, TrainingError if the model's logits are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    seeds = [(seed + index) % SEEDS for index in range(len(prompts))]
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, seeds, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop):
        texts[piece.index] += piece.text
    return texts


def stream(
    model: SmolLM2,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[Piece]:
    """Yield pieces of all continuations as they are generated. A prompt is a text or its token ids.

    `report` receives a message if a prompt is longer than the context, and each time a context window slides.
    """
    texts = [
        Continuation(index, tokenizer, read_prompt(model, tokenizer, prompt, report), seed, max_new_tokens, stop)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if not texts or max_new_tokens < 1:
        return
    with evaluation_mode(model):
        with torch.inference_mode():
            cache, logits = prefill(model, texts)
            decoder = Decoder(model, compute_dtype(model.lm_head.weight), len(texts))
        while True:
            with torch.inference_mode():
                tokens = sample(logits, sampling, [text.ids for text in texts], [text.generator for text in texts])
            yield from (piece for text, token in zip(texts, tokens, strict=True) if (piece := text.append(token)))
            if all(text.end for text in texts):
                return
            with torch.inference_mode():
                if slide_windows(texts, model.config.max_position_embeddings, report) or cache.is_full:
                    cache, logits = prefill(model, texts)
                else:
                    logits = decoder.step(torch.tensor(tokens, device=logits.device), cache)


class Continuation:
    """A sequence being generated. `ids` are the prompt and continuation; the model reads them from index `first` on."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt: list[int], seed: int, max_new_tokens: int, stop: Sequence[str]
    ) -> None:
        self.index, self.tokenizer, self.ids = index, tokenizer, list(prompt)
        self.limit = len(prompt) + max_new_tokens
        self.first, self.end = 0, ""
        self.generator = torch.Generator().manual_seed(seed)
        self.writer = Writer(tokenizer, stop)
        self.stops = tokenizer.find_controls(stop)  # control tokens have no text in which a stop string could be found

    @property
    def window(self) -> list[int]:
        """The tokens that the model reads; only the last if the sequence has ended, to keep its row in the batch."""
        return self.ids[-1:] if self.end else self.ids[self.first :]

    def append(self, token: int) -> Piece | None:
        """Append the next token; return the new text that can be shown now, if any."""
        if self.end:
            return None
        self.ids.append(token)
        if token in self.tokenizer.stops:
            self.end = "end_of_text"
        elif token in self.stops:
            self.end = "stop"
        elif len(self.ids) == self.limit:
            self.end = "length"
        text = self.writer.write(token if self.end != "end_of_text" else None, last=bool(self.end))
        if self.writer.stopped:
            self.end = "stop"
        return Piece(self.index, text, self.end) if text or self.end else None


class Writer:
    """Converts tokens to text in whole characters, and stops at a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, [word for word in stop if word]
        self.context: list[int] = []  # tokens already written: they decide whether the next one begins with a space
        self.unread: list[int] = []
        self.held = ""
        self.stopped = False

    def write(self, token: int | None, *, last: bool) -> str:
        """Return the text that can be shown after this token.

        After the last token, return all remaining text, with incomplete characters as U+FFFD.
        """
        self.unread += [] if token is None else [token]
        text = self.tokenizer.decode(self.context + self.unread)[len(self.tokenizer.decode(self.context)) :]
        if text.endswith("\ufffd") and not last:
            return ""  # perhaps an incomplete character
        if text:
            self.context, self.unread = self.unread, []
        return self.find_stop(self.held + text, last=last)

    def find_stop(self, text: str, *, last: bool) -> str:
        """Return the text before the first stop string; hold back an ending that may be the start of one."""
        found = [place for word in self.stop if (place := text.find(word)) >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        longest = 0 if last else max((count_overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - longest :]
        return text[: len(text) - longest]


def count_overlap(text: str, word: str) -> int:
    """Return how many characters at the end of `text` match the start of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def read_prompt(model: SmolLM2, tokenizer: Tokenizer, prompt: Prompt, report: Callable[[str], None]) -> list[int]:
    """Return a prompt's token ids, without the first ones if it is longer than the context."""
    ids = (tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)) or [tokenizer.end_of_text]
    check_ids(model, tokenizer, ids)
    positions = model.config.max_position_embeddings
    if len(ids) > positions:
        excess = len(ids) - positions
        report(f"the prompt has {len(ids)} tokens and the context {positions}: the first {excess} are ignored")
    return ids[-positions:]


def check_ids(model: SmolLM2, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """Raise DataError if the model has no embedding for one of the ids of a prompt."""
    vocab_size = model.config.vocab_size
    if max(ids) >= vocab_size:
        what = f"encodes the prompt with id {max(ids)}, but the model has only {vocab_size} ids"
        raise DataError(tokenizer.name, what, "use the model's own tokenizer")


def slide_windows(texts: Sequence[Continuation], positions: int, report: Callable[[str], None]) -> bool:
    """Drop the older half of each context window that is full; return whether any was full."""
    full = [text for text in texts if not text.end and len(text.ids) - text.first > positions]
    for text in full:
        text.first = len(text.ids) - max(positions // 2, 1)
        report(f"the context of {positions} tokens is full: from now on the model reads the last {positions // 2}")
    return bool(full)


def prefill(model: SmolLM2, texts: Sequence[Continuation]) -> tuple[KeyValueCache, Tensor]:
    """Return a new cache filled with all windows, with room for continuations, and the next-token logits (B, V)."""
    config, weight = model.config, model.lm_head.weight
    dtype = compute_dtype(weight)
    windows = [text.window for text in texts]
    longest = max(map(len, windows))
    step = COLUMN_STEP if dtype != torch.float32 else 1
    width = -(-longest // step) * step
    ahead = max(text.limit - len(text.ids) for text in texts if not text.end)
    columns = -(-(width + min(ahead, config.max_position_embeddings - longest)) // COLUMN_STEP) * COLUMN_STEP
    starts = torch.tensor([width - len(window) for window in windows], device=weight.device)
    shape = (config.num_hidden_layers, len(texts), config.num_key_value_heads, columns, config.head_dim)
    cache = KeyValueCache(starts, shape, dtype, config.max_position_embeddings)
    ids = torch.tensor([[0] * (width - len(window)) + window for window in windows], device=weight.device)
    return cache, model.lm_head(model.model.extend(ids, cache)[:, -1])


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of keys and values: the autocast dtype if autocast is on, else the weights' dtype."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
