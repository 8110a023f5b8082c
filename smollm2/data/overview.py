"""What the sources of a run contain, as `data.json` of its run folder has it; the report shows it."""

from typing import Any

from smollm2.config.schema import Config
from smollm2.data.batches import Batches
from smollm2.data.corpus import Corpus
from smollm2.data.overlap import Overlap, measure_overlap
from smollm2.data.store import TokenStore

COUNTS = ("documents", "characters", "bytes", "tokens", "train_tokens", "validation_tokens", "blank_documents")


def describe_sources(config: Config, corpus: Corpus, batches: Batches, overlaps: list[Overlap]) -> dict[str, Any]:
    """Return the content of data.json, whose structure report/sources.py describes."""
    epochs = batches.epochs_of(config.training.train_steps)
    rows = zip(corpus.names, corpus.stores, config.shares, epochs, overlaps, strict=True)
    return {
        "sources": [
            {
                "name": name,
                "weight": share,
                "epochs": count,
                **list_counts(store),
                "summary": store.index.summary,
                "overlap": overlap.as_dict(),
            }
            for name, store, share, count, overlap in rows
        ]
    }


def list_counts(store: TokenStore) -> dict[str, int]:
    """Return the counts of a source; of token files of another project, only those that are known."""
    s = store.statistics
    counts = {name: getattr(s, name) for name in (*COUNTS, "unknown_bytes")}
    known = counts if s.bytes else {name: counts[name] for name in ("tokens", "train_tokens", "validation_tokens")}
    return known | ({"documents": s.documents} if s.documents else {})


def measure_overlaps(corpus: Corpus) -> list[Overlap]:
    """Return for each source how much of its validation tokens also occurs in its training tokens."""
    return [measure_overlap(store.train, store.validation) for store in corpus.stores]
