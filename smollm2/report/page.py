"""The page: one self-contained file that opens from disk. Its content security policy forbids every request.

plotly is embedded in full (4.8 MB; the nine URLs in it are never requested). The policy lists the hashes of the two
scripts that may run: even if text from the run were mistaken for markup, it could not execute anything.
"""

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup

from smollm2.report.compare import COMPARISON
from smollm2.report.reading import RunFolder
from smollm2.report.sections import SECTIONS, landscape_context
from smollm2.report.templating import render
from smollm2.storage.atomic import Target, write_atomically
from smollm2.tracking.base import Landscape

FOLDER = Path(__file__).parent
CHUNK = 2**16
PAGE_BYTES = 6 * 10**6

Part = dict[str, Any]
"""One section of a page: its `id`, its `title`, the `data` for its template, and `is_collapsed`."""


def write_page(runs: Sequence[RunFolder], path: Path) -> None:
    """Write the report of one run, or the comparison of several, atomically. Raise ResourceError if this fails."""
    write_chunks(page_chunks(runs), path)


def write_landscape_page(landscape: Landscape, step: int, path: Path) -> None:
    """Write a page about one landscape, in the style of the report. Raise ResourceError if this fails."""
    part = {"id": "landscape", "title": "Landscape", "data": landscape_context(step, landscape), "is_collapsed": False}
    write_chunks(assemble("Loss landscape", [part], "landscape"), path)


def write_chunks(chunks: Iterator[bytes], path: Path) -> None:
    """Write a page to a file atomically."""

    def write(file: Target) -> None:
        for chunk in chunks:
            file.write(chunk)

    write_atomically(path, write, size=PAGE_BYTES)


def page_chunks(runs: Sequence[RunFolder]) -> Iterator[bytes]:
    """Return the chunks of the page about these runs."""
    if len(runs) == 1:
        title, data = runs[0].name, [section.build(runs[0]) for section in SECTIONS]
        return assemble(title, list_parts(SECTIONS, data), "report")
    data = [section.build(runs) for section in COMPARISON]
    return assemble(f"{len(runs)} runs compared", list_parts(COMPARISON, data), "report")


def list_parts(sections: Sequence[Any], data: Sequence[Part]) -> list[Part]:
    """Combine each section with the data for its template."""
    return [
        {"id": section.id, "title": section.title, "data": one, "is_collapsed": section.is_collapsed}
        for section, one in zip(sections, data, strict=True)
    ]


def assemble(title: str, parts: Sequence[Part], command: str) -> Iterator[bytes]:
    """Yield a page in chunks, reading plotly from its file: as one string, it would take 20 MB during training."""
    plotly = files("plotly") / "package_data" / "plotly.min.js"
    own = (FOLDER / "report.js").read_text(encoding="utf-8")
    with plotly.open("rb") as file:
        hashes = [
            hashlib.file_digest(cast(BufferedIOBase, file), "sha256").digest(),
            hashlib.sha256(own.encode()).digest(),
        ]
        values = {
            "title": title,
            "parts": parts,
            "command": command,
            "policy": policy(hashes),
            "style": Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
            "now": time.time(),
        }
        yield f"{render('page.html', values)}<script>".encode("utf-8", "backslashreplace")
        file.seek(0)
        yield from iter(lambda: file.read(CHUNK), b"")
    yield f"</script>\n<script>{own}</script>\n</body>\n</html>\n".encode()


def policy(hashes: Sequence[bytes]) -> str:
    """Return the content security policy: run only these scripts and fetch nothing. plotly needs eval for surfaces."""
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
