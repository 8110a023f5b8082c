"""The section about the training data: facts from the events, and each source's statistics from data.json."""

import math
from collections.abc import Callable, Mapping, Sequence

from smollm2.formatting import format_number
from smollm2.report.figures import Context
from smollm2.report.json_files import Row
from smollm2.report.reading import RunFolder
from smollm2.report.sources import SourceStatistics
from smollm2.report.templating import clip
from smollm2.report.verdict import begin_sentence, count_of

SHOWN_SOURCES = 100
DRAWN_SOURCES = 8
"""Sources with bars and notes of their own; of the others, only a high overlap is noted."""

SHOWN_NAME = 120

Column = Callable[[SourceStatistics], str]


def number_column(name: str, form: str = "{:,.0f}") -> Column:
    """Return what formats a number of a source."""
    return lambda source: format_number(source.numbers[name], form)


def ratio_column(top: str, bottom: str, form: str) -> Column:
    """Return what formats the ratio of two numbers of a source."""
    return lambda source: format_number(divide(source.numbers[top], source.numbers[bottom]), form)


COLUMNS: Mapping[str, Column] = {
    "Documents": number_column("documents"),
    "Duplicates": lambda source: format_number(source.duplicates.get("documents", math.nan), "{:,.0f}"),
    "Tokens": number_column("tokens"),
    "Characters per token": ratio_column("characters", "tokens", "{:.2f}"),
    "Unencodable bytes": ratio_column("unknown_bytes", "bytes", "{:.2%}"),
    "Training tokens": number_column("train_tokens"),
    "Validation tokens": number_column("validation_tokens"),
    "Weight": number_column("weight", "{:.3g}"),
    "Epochs": number_column("epochs", "{:.2f}"),
    "Overlap": lambda source: format_number(source.overlap_share, "{:.1%}"),
    "Blank": number_column("blank_documents"),
}
"""The columns of the table of sources. One that no source has a value for is omitted."""


def data_section(run: RunFolder) -> Context:
    """Return facts about the training data, and the table, the lengths and the longest documents of its sources."""
    event = run.latest("data")
    if event is None and not run.sources:
        return {"note": "This run recorded nothing about its data."}
    facts = data_facts(event) if event else {"facts": [], "used": None}
    return {**facts, "sources": sources_context(run.sources[:SHOWN_SOURCES]) if run.sources else None}


def sources_context(sources: Sequence[SourceStatistics]) -> Context:
    """Return the table, the notes, the figure of the lengths and the longest documents of these sources."""
    columns = {title: [cell(source) for source in sources] for title, cell in COLUMNS.items()}
    shown = {title: cells for title, cells in columns.items() if set(cells) != {"–"}}
    names = [clip(source.name, SHOWN_NAME) for source in sources]
    return {
        "header": ("Source", *shown),
        "rows": list(zip(names, *shown.values(), strict=True)),
        "notes": [
            (name, note, is_high)
            for number, (name, one) in enumerate(zip(names, sources, strict=True))
            for note, is_high in notes_of(one)
            if number < DRAWN_SOURCES or is_high
        ],
        "figure": lengths_figure(sources),
        "longest": [
            (name, *(format_number(row.get(key, math.nan), "{:,.0f}") for key in ("index", "tokens", "characters")))
            for name, one in zip(names, sources, strict=True)
            for row in one.longest
        ],
    }


def notes_of(source: SourceStatistics) -> list[tuple[str, bool]]:
    """Return sentences about duplicates and the overlap, each with whether its number is high."""
    count = source.duplicates.get("documents", math.nan)
    share = format_number(source.duplicates.get("token_share", math.nan), "{:.1%}")
    notes = []
    if count > 0:
        documents = count_of(int(count), "document")
        notes.append((f"{documents} with the content of an earlier one: {share} of the tokens.", False))
    if source.overlap_text:
        notes.append((begin_sentence(source.overlap_text), source.overlap_is_high))
    return notes


def lengths_figure(sources: Sequence[SourceStatistics]) -> Context | None:
    """Return the histogram of the lengths of documents, with a bar for each of the first sources; None without any.

    A bar is the share of the source's own documents: sources of different sizes can be compared.
    """
    drawn = [source for source in sources if source.histogram][:DRAWN_SOURCES]
    bins = sorted({(one["at_least"], one["below"]) for source in drawn for one in source.histogram})
    if not bins:
        return None
    bars = []
    for source in drawn:
        counts = {(one["at_least"], one["below"]): one["documents"] for one in source.histogram}
        documents = [counts.get(one, 0.0) for one in bins]
        shares = [100 * count / (sum(documents) or 1) for count in documents]
        bars.append({"name": clip(source.name, SHOWN_NAME), "documents": documents, "shares": shares})
    omitted = len(sources) - len(drawn)
    summary = " ".join(describe_lengths(source, is_alone=len(sources) == 1) for source in drawn if source.lengths)
    return {
        "kind": "bars",
        "title": "Document lengths",
        "summary": f"{summary} Not drawn: {count_of(omitted, 'more source')}." if omitted else summary,
        "data": {"title": "lengths", "bins": bins, "sources": bars},
    }


def describe_lengths(source: SourceStatistics, *, is_alone: bool) -> str:
    """Return the usual and the largest lengths of a source's documents as a sentence."""
    names = ("median", "mean", "percentile_95", "longest")
    median, mean, percentile_95, longest = (
        format_number(source.lengths.get(name, math.nan), "{:,.0f}") for name in names
    )
    start = "Median" if is_alone else f"{clip(source.name, SHOWN_NAME)}: median"
    return f"{start} {median} tokens, mean {mean}, 95 % have at most {percentile_95}, longest {longest}."


def divide(top: float, bottom: float) -> float:
    """Return the ratio, or NaN if the divisor is 0."""
    return top / bottom if bottom else math.nan


def data_facts(event: Row) -> Context:
    """Return facts about the training data, and the fraction of it that the run uses."""
    numbers = {
        name: value for name, value in event.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }

    def number(name: str, form: str = "{:,.0f}") -> str:
        return form.format(numbers[name]) if name in numbers else "–"

    def ratio(top: str, bottom: str) -> float:
        return float(numbers[top]) / float(numbers[bottom]) if top in numbers and numbers.get(bottom) else math.nan

    used, unknown = ratio("tokens_used", "train_tokens"), ratio("unknown_bytes", "bytes")
    average = format_number(ratio("tokens", "documents"), "{:,.0f}")
    characters = format_number(ratio("characters", "tokens"), "{:.2f}")
    validation = numbers.get("validation_tokens", math.nan)
    rows: list[tuple[str, object]] = [
        ("Source", event.get("input", "–")),
        ("Size", f"{number('bytes')} bytes, {number('characters')} characters"),
        ("Documents", f"{number('documents')}, {average} tokens each on average"),
        ("Tokenizer", f"{event.get('tokenizer', '–')}, {number('vocab_size')} entries"),
        ("Tokens", f"{number('tokens')}, {characters} characters each"),
        ("Unencodable bytes", describe_unknown(unknown, number("unknown_documents"))),
        ("Training", f"{number('train_tokens')} tokens in {number('windows')} windows of {number('window_tokens')}"),
        ("Validation", "none: the text is too short" if validation <= 1 else f"{number('validation_tokens')} tokens"),
        ("Epochs", f"{number('epochs', '{:.2f}')} by the end of the run"),
    ]
    return {"facts": rows, "used": None if math.isnan(used) else min(1.0, max(0.0, used))}


def describe_unknown(share: float, documents: str) -> str:
    """Return how much of the text the tokenizer cannot encode."""
    if math.isnan(share):
        return "–"
    return f"{share:.2%}, in {documents} documents" if share else "none"
