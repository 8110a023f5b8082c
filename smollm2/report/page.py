"""The page: one file that holds all it needs, opened from the disk, and forbidden by its own policy to ask for more.

plotly comes along whole (4.8 MB, and nine addresses in it that nothing asks for). The policy names the hashes of the two
scripts that may run: were a text of the run ever taken for markup, it could still run nothing.
"""

import base64
import datetime
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

from smollm2.files import write_atomically
from smollm2.report.compare import COMPARISON
from smollm2.report.markup import show
from smollm2.report.reading import RunFolder
from smollm2.report.sections import SECTIONS

PLACE = Path(__file__).parent


def build_page(runs: Sequence[RunFolder]) -> str:
    """The report of one run, or the comparison of several, as HTML."""
    from plotly.offline import get_plotlyjs  # 0.1 s, which the other commands need not pay

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
    scripts = [get_plotlyjs(), (PLACE / "report.js").read_text(encoding="utf-8")]
    style = (PLACE / "report.css").read_text(encoding="utf-8")
    now = datetime.datetime.now(datetime.UTC)
    written = f'<time datetime="{now.isoformat(timespec="seconds")}">{now:%Y-%m-%d %H:%M} UTC</time>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(scripts))}">
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
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def policy(scripts: Sequence[str]) -> str:
    """What the browser may do for this page: run these scripts, and fetch nothing. plotly compiles its surfaces by eval."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def write_page(runs: Sequence[RunFolder], path: Path) -> None:
    """The page as a file, whole or not at all. Raises ResourceError."""
    write_atomically(path, build_page(runs).encode("utf-8", "backslashreplace"))
