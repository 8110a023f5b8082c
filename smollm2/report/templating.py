"""The report's Jinja2 environment. Values pass through `display` and are then escaped, so no text is markup.

Python returns the data; the templates contain the HTML. Long text is shortened, and control characters are escaped.
"""

import datetime
from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from smollm2.tracking.base import escape_controls

SHOWN_TEXT = 4000


@cache
def environment() -> Environment:
    """Return the environment; it is cached with its compiled templates, because a run writes many pages."""
    made = Environment(
        loader=PackageLoader("smollm2.report"),
        autoescape=True,
        finalize=display,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` escapes <, >, & and ', so neither </script> nor <!-- can end the data.
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    made.filters |= {"clip": clip, "moment": moment}
    return made


def render(template: str, values: Mapping[str, object]) -> str:
    """Return the page rendered from a template."""
    return environment().get_template(template).render(values)


def display(value: object) -> object:
    """Return the value as a template shows it; long text that is not markup is shortened."""
    return clip(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def clip(text: str, limit: int = SHOWN_TEXT) -> str:
    """Return the start of a text, with control characters escaped, and the number of characters omitted, if any."""
    return escape_controls(text if len(text) <= limit else f"{text[:limit]} [{len(text) - limit:,} more characters]")


def moment(seconds: float) -> Markup:
    """Return a time in UTC as an HTML element."""
    try:
        time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return Markup("–")
    return Markup(f'<time datetime="{time.isoformat(timespec="seconds")}">{time:%Y-%m-%d %H:%M:%S}</time>')
