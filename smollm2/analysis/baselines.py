"""What can be predicted of a run's own text without a neural network: the losses of n-gram models (`ngrams.py`).

They are counted on the windows that the run trains on and evaluated on the validation windows on which checkpoints are
compared, so they can be compared with the validation loss. A target has the context that the model may attend to: none
from another window, and none from another document if documents are isolated. Of a mixture, each source gives its share of
the counted tokens, or all that it has.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from smollm2.analysis.ngrams import read_text, score_targets
from smollm2.config.schema import Config
from smollm2.data.corpus import Corpus
from smollm2.data.windows import JoinedWindows
from smollm2.errors import ResourceError
from smollm2.inference.evaluation import Evaluation, spread
from smollm2.storage.atomic import write_atomically
from smollm2.tracking.charts import BASELINES

VERSION = 1
"""Incremented when the same text gives other numbers."""

LIMIT = 5_000_000
"""The most tokens that are counted: these take about 6 s and 360 MB on one core (2026-11)."""


@dataclass(frozen=True)
class Baselines:
    """The losses of the n-gram models in nats per token and, if the tokens stand for text, in bits per byte, by name.

    They were evaluated on `targets` tokens and counted on `counted` of the `train_tokens` tokens of the run's sources.
    """

    losses: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    targets: int
    counted: int
    train_tokens: int

    def describe(self) -> str:
        """Return the losses and on which tokens they were counted, in one line."""
        shown = ", ".join(f"{name} {loss:.2f}" for name, loss in self.losses.items())
        bits = ", ".join(f"{value:.2f}" for value in self.bits_per_byte.values())
        also = f" ({bits} bits per byte)" if bits else ""
        return f"{shown} nats per token{also}, counted on {self.counted:,} of {self.train_tokens:,} tokens"

    @classmethod
    def from_json(cls, text: str) -> "Baselines":
        """Return the baselines that a file holds. Raise ValueError, TypeError, KeyError or AttributeError if it is damaged."""
        values = json.loads(text)
        found = cls(**values)
        numbers = [*found.losses.values(), *found.bits_per_byte.values(), found.targets, found.counted]
        if tuple(found.losses) != BASELINES or not all(0 <= number < math.inf for number in numbers):
            raise ValueError(values)
        return found


def find_baselines(
    config: Config, corpus: Corpus, training: JoinedWindows, validation: JoinedWindows, compared: Sequence[int]
) -> Baselines:
    """Return the baselines on the `compared` windows of `validation`, from the cache or newly measured.

    Raise DataError if a window cannot be read.
    """
    folder = Path(config.data.cache_dir)
    path = folder / f"baselines-{fingerprint_of(config, corpus)[:32]}.json"
    try:
        return Baselines.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = measure_baselines(corpus, training, config.shares, validation, compared)
    with contextlib.suppress(OSError, ResourceError):  # they are measured again then
        write_atomically(path, f"{json.dumps(asdict(found))}\n".encode())
    return found


def fingerprint_of(config: Config, corpus: Corpus) -> str:
    """Return the fingerprint of everything that determines the baselines."""
    data, t = config.data, config.training
    stores = [store for one in corpus.stores for store in (one, one.other) if store]
    rule = [VERSION, LIMIT, *(store.fingerprint for store in stores), corpus.tokenizer.fingerprint, config.shares]
    rule += [t.sequence_length, t.eval_windows, data.document_mask, data.pack, data.stride, data.held_out_fraction]
    return hashlib.sha256(json.dumps(rule).encode()).hexdigest()


def measure_baselines(
    corpus: Corpus,
    training: JoinedWindows,
    shares: Sequence[float],
    validation: JoinedWindows,
    compared: Sequence[int],
    limit: int = LIMIT,
) -> Baselines:
    """Return the baselines, counted on at most about `limit` tokens, in evenly spread windows."""
    chosen = [
        first + i
        for (first, last), share in zip(pairwise(training.first), shares, strict=True)
        for i in spread(last - first, max(1, round(limit * share / training.length)) if share else 0)
    ]
    counted, scored = read_text(training, chosen), read_text(validation, compared)
    targets = scored.targets
    text_bytes = int(corpus.tokenizer.bytes_per_token[targets].sum())
    probabilities = score_targets(counted, scored, corpus.tokenizer.vocab_size)
    sums = {name: Evaluation(float(-np.log(p).sum()), len(targets), text_bytes) for name, p in probabilities.items()}
    return Baselines(
        losses={name: found.loss for name, found in sums.items()},
        bits_per_byte={name: found.bits_per_byte for name, found in sums.items()} if text_bytes else {},
        targets=len(targets),
        counted=len(counted.targets),
        train_tokens=corpus.train_tokens,
    )
