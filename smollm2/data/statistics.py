"""Statistics of a corpus, from one number per document: lengths, exact duplicates and the longest documents."""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.uint64]

LONGEST = 10
BORDERS = 2 ** np.arange(64, dtype=np.uint64)

Summary = dict[str, object]


def summarize_documents(characters: Counts, tokens: Counts, hashes: Counts, size: int | None = None) -> Summary:
    """Return statistics of the documents, ready for JSON; `size` is the number of bytes of the text, if it is known.

    The arrays have one entry per document, each (documents,): its characters, its tokens, and a 64-bit hash of its
    content. Takes memory for about two more such arrays.

    The keys are `documents`, `characters`, `bytes` (absent if unknown), `tokens`, `characters_per_token` (None without
    tokens), `lengths`, `histogram`, `duplicates` and `longest`, described at the functions that return them.
    """
    assert len(characters) == len(tokens) == len(hashes)
    total_characters, total = int(characters.sum()), int(tokens.sum())
    return {
        "documents": len(tokens),
        "characters": total_characters,
        **({} if size is None else {"bytes": size}),
        "tokens": total,
        "characters_per_token": total_characters / total if total else None,
        "lengths": summarize_lengths(tokens),
        "histogram": count_lengths(tokens),
        "duplicates": count_duplicates(tokens, hashes),
        "longest": find_longest(characters, tokens),
    }


def summarize_lengths(tokens: Counts) -> dict[str, float] | None:
    """Return `mean`, `median`, `percentile_95` and `longest` of the tokens per document; None without documents.

    The percentiles are lengths of documents that exist, by nearest rank: at least that share is no longer.
    """
    if not len(tokens):
        return None
    median, percentile_95 = np.quantile(tokens, [0.5, 0.95], method="inverted_cdf").tolist()
    return {
        "mean": float(tokens.mean()),
        "median": int(median),
        "percentile_95": int(percentile_95),
        "longest": int(tokens.max()),
    }


def count_lengths(tokens: Counts) -> list[dict[str, int]]:
    """Return the histogram: `documents` with `at_least` and `below` so many tokens, from the shortest to the longest.

    The borders are powers of two; documents without tokens are in a bin of their own, from 0 to 1. Empty bins between
    the first and the last one are included.
    """
    counts = np.bincount(np.searchsorted(BORDERS, tokens, side="right"), minlength=len(BORDERS) + 1)
    used = np.flatnonzero(counts).tolist()
    bins = range(used[0], used[-1] + 1) if used else ()
    return [{"at_least": 2**i // 2, "below": 2**i, "documents": int(counts[i])} for i in bins]


def count_duplicates(tokens: Counts, hashes: Counts) -> dict[str, float]:
    """Return `documents`, the number of those whose hash occurred in an earlier one, and `token_share`, their share of
    all tokens."""
    order = np.argsort(hashes, kind="stable")  # stable: of equal documents, the first one is not a duplicate
    ordered = hashes[order]
    repeated = order[1:][ordered[1:] == ordered[:-1]]
    total = int(tokens.sum())
    return {"documents": len(repeated), "token_share": int(tokens[repeated].sum()) / total if total else 0.0}


def find_longest(characters: Counts, tokens: Counts) -> list[dict[str, int]]:
    """Return `index`, `characters` and `tokens` of the ten documents with the most tokens, the longest first.

    `index` counts documents from 0 in the order of the corpus. Of documents of the same length, the first ones are taken.
    """
    count = min(LONGEST, len(tokens))
    if not count:
        return []
    limit = np.partition(tokens, len(tokens) - count)[len(tokens) - count]
    above = np.flatnonzero(tokens > limit)
    chosen = np.concatenate([above, np.flatnonzero(tokens == limit)[: count - len(above)]])
    chosen = chosen[np.argsort(-tokens[chosen].astype(np.int64), kind="stable")]
    return [{"index": int(i), "characters": int(characters[i]), "tokens": int(tokens[i])} for i in chosen]
