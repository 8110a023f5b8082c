"""The page: one self-contained file, opened from the disk, and forbidden by its own policy to request anything else.

plotly is included whole (4.8 MB; nothing requests the nine URLs in it). The policy names the hashes of the two
scripts that may run: even if a text of the run were taken for markup, it could not execute anything.
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
"""One section of a page: `id`, `title`, `data` of its template, `is_collapsed`."""


def write_page(runs: Sequence[RunFolder], path: Path) -> None:
    """Write the report of one run, or the comparison of several; whole or not at all. Raise ResourceError if it fails."""
    write_chunks(page_chunks(runs), path)


def write_landscape_page(landscape: Landscape, step: int, path: Path) -> None:
    """Write the page of one landscape, in the style of the report. Raise ResourceError if it fails."""
    part = {"id": "landscape", "title": "Landscape", "data": landscape_context(step, landscape), "is_collapsed": False}
    write_chunks(assemble("Loss landscape", [part], "landscape"), path)


def write_chunks(chunks: Iterator[bytes], path: Path) -> None:
    """Write a page as a file; whole or not at all."""

    def write(file: Target) -> None:
        for chunk in chunks:
            file.write(chunk)

    write_atomically(path, write, size=PAGE_BYTES)


def page_chunks(runs: Sequence[RunFolder]) -> Iterator[bytes]:
    """Return the page about the runs in chunks."""
    if len(runs) == 1:
        title, data = runs[0].name, [section.build(runs[0]) for section in SECTIONS]
        return assemble(title, list_parts(SECTIONS, data), "report")
    data = [section.build(runs) for section in COMPARISON]
    return assemble(f"{len(runs)} runs compared", list_parts(COMPARISON, data), "report")


def list_parts(sections: Sequence[Any], data: Sequence[Part]) -> list[Part]:
    """Join each section with the data of its template."""
    return [
        {"id": section.id, "title": section.title, "data": one, "is_collapsed": section.is_collapsed}
        for section, one in zip(sections, data, strict=True)
    ]


def assemble(title: str, parts: Sequence[Part], command: str) -> Iterator[bytes]:
    """Yield a page in chunks, plotly read from its file: as one string it would take 20 MB beside a training run."""
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
    """Return the page's content security policy: run these scripts, fetch nothing. plotly draws surfaces with eval."""
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
