"""Read data.json of a run folder: what each source of the training text contains. Older runs have no such file.

{"sources": [{
    "name": "data/fineweb",                            required; every other key may be absent or null
    "weight": 0.7, "epochs": 1.2,                      share of the batches; how often the run reads the source
    "documents", "characters", "bytes", "tokens",      numbers of what was read
    "train_tokens", "validation_tokens",
    "blank_documents", "unknown_bytes",                dropped; not represented by the tokenizer
    "summary": {...},                                  by smollm2.data.statistics.summarize_documents
    "overlap": {"share", "text", "is_high"}            by smollm2.data.overlap.Overlap.as_dict
}]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smollm2.errors import lay_out
from smollm2.report.json_files import Row, read_object, to_number, to_numbers, to_text

NUMBERS = (
    "weight",
    "epochs",
    "documents",
    "characters",
    "bytes",
    "tokens",
    "train_tokens",
    "validation_tokens",
    "blank_documents",
    "unknown_bytes",
)

LARGEST_HISTOGRAM = 65
LARGEST_LIST = 10


@dataclass(frozen=True)
class SourceStatistics:
    """What data.json contains about one source. A number that is not given is NaN, and so is the share of the overlap."""

    name: str
    numbers: Mapping[str, float]
    lengths: Mapping[str, float] = field(default_factory=dict)
    histogram: Sequence[Mapping[str, float]] = ()
    duplicates: Mapping[str, float] = field(default_factory=dict)
    longest: Sequence[Mapping[str, float]] = ()
    overlap_share: float = float("nan")
    overlap_text: str = ""
    overlap_is_high: bool = False


def read_sources(path: Path, problems: list[str]) -> Sequence[SourceStatistics]:
    """Return what data.json contains, empty if the file is missing or damaged; damage is added to `problems`."""
    row = read_object(path, problems)
    if row is None:
        return ()
    try:
        return [parse_source(source) for source in row["sources"]]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        problems.append(lay_out(path.name, "is not a valid description of the data"))
        return ()


def parse_source(row: Row) -> SourceStatistics:
    """Return one source after checking the types of all values."""
    summary, overlap = row.get("summary") or {}, row.get("overlap") or {}
    return SourceStatistics(
        name=to_text(row["name"]),
        numbers={name: to_number(row.get(name)) for name in NUMBERS},
        lengths=to_numbers(summary.get("lengths") or {}),
        histogram=[read_bin(one) for one in (summary.get("histogram") or [])[:LARGEST_HISTOGRAM]],
        duplicates=to_numbers(summary.get("duplicates") or {}),
        longest=[to_numbers(one) for one in (summary.get("longest") or [])[:LARGEST_LIST]],
        overlap_share=to_number(overlap.get("share")),
        overlap_text=to_text(overlap.get("text") or ""),
        overlap_is_high=overlap.get("is_high") is True,
    )


def read_bin(row: Row) -> Mapping[str, float]:
    """Return one bin of the histogram. Raise ValueError if a number is missing."""
    numbers = {name: to_number(row[name]) for name in ("at_least", "below", "documents")}
    if any(number != number or number < 0 for number in numbers.values()):  # NaN
        raise ValueError(row)
    return numbers
