"""N-gram language models, counted on some windows of tokens and evaluated on others.

Every order is interpolated Kneser-Ney (Kneser and Ney 1995, in the interpolated form of Chen and Goodman 1999, section 2.8):

    p_n(w | h) = (max(c(hw) - D, 0) + D t(h) p_{n-1}(w | h')) / c(h),    p_0(w) = 1 / V

where c(h) is the sum of c(hw) over w, t(h) the number of different w with c(hw) > 0, and h' is h without its first token.
At the highest order, c counts how often hw occurs; below it, c counts the different tokens before hw. A context that was
never counted leaves the distribution as it is. The discount of an order is estimated from the numbers n1 and n2 of n-grams
with the counts 1 and 2 (Ney, Essen and Kneser 1994), D = (n1 + 1/2) / (n1 + 2 n2 + 1), which is never 0 or 1: each
distribution is proper, and no token has the probability 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.windows import Batch, WindowSource, stack
from smollm2.tracking.charts import BASELINES

ORDERS = dict(zip(BASELINES[1:], (1, 2, 3, 5), strict=True))
"""How many tokens each model reads, the predicted one included; the first baseline, `uniform`, reads none."""

HIGHEST = max(ORDERS.values())

CHUNK = 2**18
"""Tokens of the windows that are read at a time, before they are stored in 6 bytes each."""

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """The tokens of several windows, one window after another, each array (N,).

    `reach` is how many tokens, this one included, the window has of the same document up to here, at most `HIGHEST`. Only
    the tokens with `is_target` are counted or scored.
    """

    tokens: Ids
    reach: npt.NDArray[np.int8]
    is_target: npt.NDArray[np.bool_]

    @property
    def targets(self) -> Ids:
        """The ids of the tokens that are counted or scored, in order."""
        return self.tokens[self.is_target]


def read_text(windows: WindowSource, indices: Sequence[int]) -> Text:
    """Return the tokens of these windows. Raise DataError if one cannot be read."""
    count = max(1, CHUNK // windows.length)
    chunks = (indices[i : i + count] for i in range(0, len(indices), count))
    return join([lay_out(stack([windows.read(i) for i in chunk])) for chunk in chunks])


def join(texts: Sequence[Text]) -> Text:
    """Return several texts as one."""
    return Text(
        np.concatenate([text.tokens for text in texts]),
        np.concatenate([text.reach for text in texts]),
        np.concatenate([text.is_target for text in texts]),
    )


def lay_out(batch: Batch) -> Text:
    """Return the tokens of a batch (B, T): T + 1 of each window, because its last target is not an input."""
    input_ids, labels, documents = batch
    tokens, is_target = (np.pad(part, ((0, 0), (0, 1))) for part in (input_ids, np.zeros(labels.shape, bool)))
    is_target[:, 1:] = labels != IGNORE_INDEX
    np.copyto(tokens[:, 1:], labels, where=is_target[:, 1:])
    begins = np.zeros(tokens.shape, bool)
    begins[:, 0] = True
    if documents is not None:
        begins[:, 1:-1] = documents[:, 1:] != documents[:, :-1]
    at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    reach = at - np.maximum.accumulate(np.where(begins, at, 0), 1) + 1
    return Text(tokens.astype(np.int32).ravel(), np.minimum(reach, HIGHEST).astype(np.int8).ravel(), is_target.ravel())


@dataclass(frozen=True)
class Grams:
    """The different n-grams of one order in the counted text.

    `keys` (G,), ascending, are context x V + token, where a context is the number of an n-gram of the order below.
    `counts` (G,) is how often each is a target. `found` (M,) are the numbers of the n-grams that end at each token of the
    scored text, or -1, and `contexts` (M,) those of the contexts before it.
    """

    keys: Ints
    counts: Ints
    found: Ids
    contexts: Ids


def score_targets(counted: Text, scored: Text, vocab_size: int) -> dict[str, Floats]:
    """Return the probability that each model gives each target of `scored`, (targets,) by the name of the model.

    A token with fewer tokens before it than a model reads is predicted from those. 5 million counted tokens take up to
    about 400 MB.
    """
    places = np.flatnonzero(scored.is_target)
    uniform = np.full(len(places), 1.0 / vocab_size)
    probabilities, lower = {"uniform": uniform}, uniform
    names = {order: name for name, order in ORDERS.items()}
    numbers = np.zeros(len(counted.tokens), np.int32)  # of the n-grams that end at each token; one has no tokens
    found, below = np.zeros(len(scored.tokens), np.int32), None
    for order in range(1, HIGHEST + 1):
        numbers, suffixes, grams = count_grams(counted, numbers, scored, found, order, vocab_size)
        if below is not None:  # the order below counts the different tokens before its n-grams
            kinds = np.bincount(suffixes[grams.counts > 0], minlength=len(below.keys))
            lower = interpolate(lower, kinds, below, places, vocab_size)
        found, below = grams.found, grams
        if order in names:
            probabilities[names[order]] = interpolate(lower, grams.counts, grams, places, vocab_size)
    return probabilities


def count_grams(
    counted: Text, numbers: Ids, scored: Text, found: Ids, order: int, vocab_size: int
) -> tuple[Ids, Ids, Grams]:
    """Return the number of the n-gram that ends at each counted token or -1, the number of each n-gram without its first
    token, and the n-grams. `numbers` and `found` are those of the order below in the two texts."""
    at = np.flatnonzero(counted.reach >= order)
    wanted = counted.tokens[at].astype(np.int64)
    if order > 1:
        wanted += numbers[at - 1].astype(np.int64) * vocab_size
    keys, inverse = number(wanted)
    suffixes = np.zeros(len(keys), np.int32)
    suffixes[inverse] = numbers[at]
    counts = np.bincount(inverse[counted.is_target[at]], minlength=len(keys))
    own = np.full(len(numbers), -1, np.int32)
    own[at] = inverse
    del at
    contexts = np.full(len(found), -1, np.int32)
    asked = np.flatnonzero(scored.reach >= order)
    contexts[asked] = found[asked - 1] if order > 1 else 0
    asked = asked[contexts[asked] >= 0] if len(keys) else asked[:0]
    wanted = contexts[asked].astype(np.int64) * vocab_size + scored.tokens[asked]
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    known = np.full(len(found), -1, np.int32)
    known[asked] = np.where(keys[places] == wanted, places, -1)
    return own, suffixes, Grams(keys, counts, known, contexts)


def number(values: Ints) -> tuple[Ints, Ids]:
    """Return the different values, ascending, and the index of each value among them. `values` is overwritten."""
    bits = len(values).bit_length()
    if len(values) and int(values.max()) >> (63 - bits):
        kept, found = np.unique(values, return_inverse=True)
        return kept, found.astype(np.int32)
    # A value and its place in one integer: 5 million are sorted in 0.1 s, np.unique needs 1.1 s to sort their places.
    values <<= bits
    values |= np.arange(len(values))
    values.sort()
    places = (values & ((1 << bits) - 1)).astype(np.int32)
    values >>= bits
    is_new = np.diff(values, prepend=-1) > 0
    inverse: Ids = np.empty(len(values), np.int32)
    inverse[places] = np.cumsum(is_new, dtype=np.int32) - 1
    return values[is_new], inverse


def interpolate(lower: Floats, counts: Ints, grams: Grams, places: Ints, vocab_size: int) -> Floats:
    """Return the probabilities of the targets at `places`, of one order with these counts above the order below."""
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = (once + 0.5) / (once + 2 * twice + 1)
    before = (grams.keys // vocab_size).astype(np.int32)
    totals = np.bincount(before, counts)
    kinds = np.bincount(before, counts > 0)
    contexts, found = grams.contexts[places], grams.found[places]
    is_known = (contexts >= 0) & (contexts < len(totals))
    is_known[is_known] = totals[contexts[is_known]] > 0
    contexts, own = contexts[is_known], counts[found[is_known]] * (found[is_known] >= 0)
    probabilities = lower.copy()
    probabilities[is_known] = (np.maximum(own - discount, 0) + discount * kinds[contexts] * lower[is_known]) / totals[
        contexts
    ]
    return probabilities
