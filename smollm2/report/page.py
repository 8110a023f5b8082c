"""The page: one file that holds all it needs, opened from the disk, and forbidden by its own policy to ask for more.

plotly comes along whole (4.8 MB, and nine addresses in it that nothing asks for). The policy names the hashes of the two
scripts that may run: were a text of the run ever taken for markup, it could still run nothing.
"""

import base64
import datetime
import hashlib
import html
from collections.abc import Iterator, Sequence
from importlib.resources import files
from io import BufferedIOBase
from pathlib import Path
from typing import cast

from smollm2.report.compare import COMPARISON
from smollm2.report.markup import show
from smollm2.report.reading import RunFolder
from smollm2.report.sections import SECTIONS
from smollm2.storage.atomic import Target, write_atomically

PLACE = Path(__file__).parent
BLOCK = 2**16
PAGE_BYTES = 6 * 10**6


def write_page(runs: Sequence[RunFolder], path: Path) -> None:
    """The report of one run, or the comparison of several, as a file; whole or not at all. Raises ResourceError."""

    def write(file: Target) -> None:
        for part in page_parts(runs):
            file.write(part)

    write_atomically(path, write, size=PAGE_BYTES)


def page_parts(runs: Sequence[RunFolder]) -> Iterator[bytes]:
    """The page in pieces, plotly among them as it lies on the disk: put together they would fill 20 MB beside a training."""
    plotly = files("plotly") / "package_data" / "plotly.min.js"
    own = (PLACE / "report.js").read_text(encoding="utf-8")
    with plotly.open("rb") as file:
        hashes = [
            hashlib.file_digest(cast(BufferedIOBase, file), "sha256").digest(),
            hashlib.sha256(own.encode()).digest(),
        ]
        yield f"{build_body(runs, policy(hashes))}<script>".encode("utf-8", "backslashreplace")
        file.seek(0)
        yield from iter(lambda: file.read(BLOCK), b"")
    yield f"</script>\n<script>{own}</script>\n</body>\n</html>\n".encode()


def build_body(runs: Sequence[RunFolder], allowed: str) -> str:
    """The page up to its scripts."""
    if len(runs) == 1:
        title, parts = runs[0].name, [(part.id, part.title, part.build(runs[0])) for part in SECTIONS]
    else:
        title = f"{len(runs)} runs compared"
        parts = [(identity, heading, build(runs)) for identity, heading, build in COMPARISON]
    links = "".join(f'<li><a href="#{identity}">{heading}</a></li>' for identity, heading, _ in parts)
    body = "".join(
        f'<section id="{identity}" aria-labelledby="{identity}-title"><h2 id="{identity}-title">{heading}</h2>{content}'
        "</section>"
        for identity, heading, content in parts
    )
    style = (PLACE / "report.css").read_text(encoding="utf-8")
    now = datetime.datetime.now(datetime.UTC)
    written = f'<time datetime="{now.isoformat(timespec="seconds")}">{now:%Y-%m-%d %H:%M} UTC</time>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(allowed)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{show(title)} · SmolLM2 Training</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the report</a>
<header class="top">
<p class="brand">SmolLM2 Training</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<button type="button" id="theme" aria-pressed="false">Dark</button>
</header>
<main id="content" tabindex="-1">
<h1>{show(title)}</h1>
{body}
</main>
<footer><p>Written {written} by <code>smollm2 report</code>. This file asks nothing of any network.</p></footer>
<noscript><p class="note">The charts need JavaScript; the tables and sentences do not.</p></noscript>
"""


def policy(hashes: Sequence[bytes]) -> str:
    """What the browser may do for this page: run these scripts, and fetch nothing. plotly compiles its surfaces by eval."""
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
