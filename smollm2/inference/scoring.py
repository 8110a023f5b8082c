"""Score continuations of contexts, and generate text, in batches, with the results of lm-eval's `hf` model.

This file needs no lm_eval: harness.py connects it. Requests are sorted by length and padded on the right, and each
batch is one forward pass. Requests with the same input, such as one-letter choices of a question, share a row.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.data.tokenizer_files import find_begin_of_text
from smollm2.errors import ConfigError, DataError
from smollm2.inference.generation import check_ids, stream
from smollm2.inference.mode import evaluation_mode
from smollm2.inference.sampling import Sampling
from smollm2.model.transformer import SmolLM2

Pair = tuple[list[int], list[int]]
"""The token ids of a context and of its continuation."""

Score = tuple[float, bool]
"""The log-probability of a continuation in nats, and whether each of its tokens is the most likely one."""

PROGRESS_SECONDS = 30.0
"""The minimum time between two reports of the progress."""

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the maximum number of new tokens; the first one given counts."""

IGNORED = {"num_beams": 1, "use_cache": True}
"""Settings of tasks that are accepted with this value only, which changes nothing here."""


class TextEncoder:
    """Encodes text as transformers does: the text of a special token, such as `<|im_start|>`, becomes that token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend = tokenizer.backend
        name = find_begin_of_text(tokenizer.files)
        begin = None if name is None else tokenizer.id_of(name)
        self.prefix = tokenizer.end_of_text if begin is None else begin
        """The id before a text without a context: the begin of text if the tokenizer has one, else the end of text."""
        self.prefix_text = tokenizer.token(self.prefix)

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text. By default, the tokenizer's own begin is added unless the text contains it."""
        add = not text.startswith(self.prefix_text) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.backend.encode(text, add_special_tokens=add).ids
        return ids


@dataclass(frozen=True)
class Scorer:
    """A model that scores and continues requests of token ids, with a context window of `context` tokens."""

    model: SmolLM2
    tokenizer: Tokenizer
    context: int
    batch_size: int
    report: Callable[[str], None] = lambda message: None

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Return the score of each pair's continuation.

        The first tokens of an input that is longer than the context are ignored. Raise DataError if a continuation has
        no token, or more than the context.
        """
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)  # the pairs of each input
        for number, (context, continuation) in enumerate(pairs):
            if not 1 <= len(continuation) <= self.context:
                what = f"has {len(continuation)} tokens, and the context {self.context}"
                raise DataError(f"the continuation of request {number + 1}", what, "use another --context or task")
            rows[tuple((context + continuation)[-self.context - 1 : -1])].append(number)
        excess = sum(len(context) + len(continuation) > self.context + 1 for context, continuation in pairs)
        if excess:
            self.report(f"{excess:,} of {len(pairs):,} requests exceed the context; their first tokens are ignored")
        scores: list[Score] = [(0.0, True)] * len(pairs)
        inputs = sorted(rows, key=len, reverse=True)  # the batch that needs the most memory first
        reported = time.monotonic()
        with evaluation_mode(self.model):
            for start in range(0, len(inputs), self.batch_size):
                if time.monotonic() > reported + PROGRESS_SECONDS:
                    reported = time.monotonic()
                    self.report(f"{start:,} of {len(inputs):,} inputs are scored")
                batch = inputs[start : start + self.batch_size]
                members = [(row, number) for row, ids in enumerate(batch) for number in rows[ids]]
                lengths = [len(batch[row]) for row, _ in members]
                targets = [pairs[number][1] for _, number in members]
                places = [(row, length) for (row, _), length in zip(members, lengths, strict=True)]
                found = self._score_batch(batch, places, targets)
                for (_, number), score in zip(members, found, strict=True):
                    scores[number] = score
        return scores

    def _score_batch(
        self, batch: Sequence[tuple[int, ...]], places: Sequence[tuple[int, int]], targets: Sequence[list[int]]
    ) -> Iterator[Score]:
        """Yield the score of each target, whose row and end in it are in `places`."""
        device, width = self.model.lm_head.weight.device, len(batch[0])
        for ids in (*batch, *targets):
            check_ids(self.model, self.tokenizer, ids)
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=device)
        hidden = self.model.model(padded)
        states = torch.cat([hidden[row, end - len(ids) : end] for (row, end), ids in zip(places, targets, strict=True)])
        labels = torch.tensor([token for ids in targets for token in ids], device=device)
        scored, greedy = score_tokens(states, self.model.lm_head.weight, labels)
        sizes = [len(ids) for ids in targets]
        for part, same in zip(torch.split(scored, sizes), torch.split(greedy, sizes), strict=True):
            yield part.sum().item(), bool(same.all())

    def generate(self, requests: Sequence[tuple[list[int], Mapping[str, Any]]]) -> list[str]:
        """Return the text after each prompt (token ids) with the settings of its task.

        Raise ConfigError for a setting that is not supported, or a text that does not fit into the context.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for number, (_, settings) in enumerate(requests):
            groups[json.dumps(settings, sort_keys=True)].append(number)
        for numbers in groups.values():
            sampling, max_new_tokens, stop = read_settings(requests[numbers[0]][1])
            room = self.context - max_new_tokens
            if room < 1:
                what = f"{self.context} tokens leave no room for a prompt: the task generates {max_new_tokens}"
                raise ConfigError("context", what, "use a model with a longer context, or omit the task")
            numbers.sort(key=lambda number: -len(requests[number][0]))
            if excess := sum(len(requests[number][0]) > room for number in numbers):
                self.report(f"{excess:,} of {len(numbers):,} prompts exceed {room} tokens; their first are ignored")
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts = [requests[number][0][-room:] for number in batch]
                pieces = stream(
                    self.model,
                    self.tokenizer,
                    prompts,
                    batch,  # the seed of a request is its number: the batch size does not change what is drawn
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    stop=stop,
                )
                for piece in pieces:
                    texts[batch[piece.index]] += piece.text
        return texts


def score_tokens(states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability (N,) float64 of each label after states (N, C), and whether it is the most likely.

    Only the logits of one chunk of states are in memory at a time.
    """
    chunk = 8192 if states.is_cuda else 512
    scored, greedy = [], []
    for part, targets in zip(torch.split(states, chunk), torch.split(labels, chunk), strict=True):
        logits = (part @ weight.T).float()
        greedy.append(logits.argmax(-1) == targets)
        scored.append(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).double())
    return torch.cat(scored), torch.cat(greedy)


def read_settings(settings: Mapping[str, Any]) -> tuple[Sampling, int, list[str]]:
    """Return how a task samples, the maximum number of new tokens, and its stop strings.

    As in lm-eval, text is greedy unless the task sets `do_sample`, or a temperature without `do_sample`, and has at
    most 256 tokens. Raise ConfigError for a setting that is not supported.
    """
    rest = dict(settings)
    stop = rest.pop("until", None) or []
    lengths = [rest.pop(name, None) for name in LENGTH_NAMES]
    do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if do_sample is None:
        do_sample = bool(temperature)
    drawn = {name: rest.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in rest}
    for name, value in rest.items():
        if name not in IGNORED or value != IGNORED[name]:
            raise ConfigError(f"generation_kwargs.{name}", f"{value!r} is not supported", "remove it from the task")
    temperature = (1.0 if temperature is None else float(temperature)) if do_sample else 0.0
    max_new_tokens = next((int(length) for length in lengths if length is not None), 256)
    return Sampling(temperature, **drawn), max_new_tokens, [stop] if isinstance(stop, str) else list(stop)
