"""Pieces of HTML. Every text of a run folder passes `show`, all data `data_of`: nothing that a model or a user wrote is markup."""

import datetime
import html
import json
from collections.abc import Iterable, Sequence

from smollm2.tracking.base import escape_controls

SHOWN_TEXT = 4000


def show(value: object, limit: int = SHOWN_TEXT) -> str:
    """Any text as HTML that shows it: markup, control characters and halves of letters come out as they are spelt."""
    return html.escape(clip(str(value), limit))


def data_of(value: object) -> str:
    """Data for report.js. `<` is spelt out: neither `</script>` nor `<!--` can end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def figure(kind: str, title: str, summary: str, data: object, controls: str = "") -> str:
    """A chart: drawn from `data`, and said in a sentence for those who do not see it."""
    return (
        f'<figure data-chart="{kind}"><figcaption><h3>{show(title)}</h3><p>{show(summary)}</p></figcaption>{controls}'
        f'<div class="plot" role="img" aria-label="{show(f"{title}. {summary}")}"></div>{data_of(data)}</figure>'
    )


def choices(name: str, legend: str, options: Sequence[str]) -> str:
    """Radio buttons in a row, the first chosen."""
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{show(option)}"{" checked" * (option == options[0])}>'
        f"<span>{show(option.replace('_', ' '))}</span></label>"
        for option in options
    )
    return f'<fieldset class="choices"><legend>{show(legend)}</legend>{buttons}</fieldset>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str, *, numeric: bool = False) -> str:
    """Rows whose first cell names them; cells are text, or HTML where a `Markup` says so. It scrolls by itself."""
    head = "".join(f'<th scope="col">{show(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{cell_of(row[0])}</th>{"".join(f"<td>{cell_of(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kind = ' class="numeric"' if numeric else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{show(caption)}"><table{kind}>'
        f'<caption class="hidden">{show(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


class Markup(str):
    """Text that is HTML already, made here and of nothing else."""


def cell_of(value: object) -> str:
    """A cell's HTML."""
    return value if isinstance(value, Markup) else show(value)


def folded(summary: str, content: str) -> str:
    """Content that is there for those who ask."""
    return f"<details><summary>{show(summary)}</summary>{content}</details>"


def facts(pairs: Iterable[tuple[str, object]], kind: str = "facts") -> str:
    """Names and values."""
    rows = "".join(f"<div><dt>{show(name)}</dt><dd>{cell_of(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">{rows}</dl>'


def note(sentence: str) -> str:
    """Why there is nothing to see."""
    return f'<p class="note">{show(sentence)}</p>'


def show_time(seconds: float) -> Markup:
    """A moment, in UTC."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return Markup("–")
    return Markup(f'<time datetime="{moment.isoformat(timespec="seconds")}">{moment:%Y-%m-%d %H:%M:%S}</time>')


def clip(text: str, limit: int = SHOWN_TEXT) -> str:
    """The beginning of a text, that it is one being said, with what a terminal or a page would obey spelt out."""
    return escape_controls(text if len(text) <= limit else f"{text[:limit]} [{len(text) - limit:,} more characters]")
