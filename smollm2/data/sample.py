"""The sample corpus: English text that is part of every Python installation, so that a first run needs no download.

It is the language reference (`pydoc_data.topics`) and the docstrings of the standard library: about 2 MB, one document
per topic or module. The source files are parsed, never imported: importing `antigravity` opens a browser. Examples
(`>>>`) are left out, and a docstring shared by many functions is kept once.
"""

import ast
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from smollm2.data.text import CHOOSE_FILE
from smollm2.errors import DataError
from smollm2.storage.atomic import write_atomically

SEPARATOR = "\f"
FEWEST_CHARACTERS = 200
LEFT_OUT = {"dist-packages", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
"""Folders of third-party packages, and of tests, which hold no prose."""


def write_sample_corpus(path: Path) -> str:
    """Write the corpus to `path` atomically; return one line that describes it.

    The text depends only on the Python version. Raise DataError if this Python has no source files.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = dict(read_topics(library)) | dict(read_modules(library))
    if not documents:
        what = "this Python has no source files of its standard library, from which the sample corpus is made"
        raise DataError(library, what, CHOOSE_FILE)
    # Sorted by title, not by kind, so that topics and modules are mixed throughout.
    text = SEPARATOR.join(documents[title] + "\n" for title in sorted(documents))
    write_atomically(path, text.encode("utf-8"))
    return (
        f"the language reference and the docstrings of Python {platform.python_version()}'s standard library: "
        f"{len(documents):,} documents, {len(text) / 1e6:.1f} million characters"
    )


def read_topics(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of each topic of the language reference."""
    tree = parse_source(library / "pydoc_data" / "topics.py")
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in ast.literal_eval(statement.value).items():
                yield f"{topic} (topic)", clean_prose(text)


def read_modules(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (title, docstrings in reading order) of each module of the standard library that has enough of them."""
    already_read: set[str] = set()
    for path in sorted(find_modules(library)):
        if tree := parse_source(path):
            docstrings = [text for text in read_docstrings(tree) if text not in already_read]
            already_read.update(docstrings)
            text = clean_prose("\n\n".join(dict.fromkeys(docstrings)))
            if len(text) >= FEWEST_CHARACTERS:
                yield ".".join(path.relative_to(library).with_suffix("").parts), text


def find_modules(library: Path) -> Iterator[Path]:
    """Yield the source files of the standard library, in any order."""
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # site-packages may have thousands
        for name in files:
            path = Path(folder, name)
            if path.suffix == ".py" and path.stem not in LEFT_OUT:
                yield path


def parse_source(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file, or None if it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in the library's sources
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None


def read_docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, from top to bottom."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
        for child in node.body:
            yield from read_docstrings(child)


def clean_prose(text: str) -> str:
    """Return the paragraphs of `text` that are not examples, without separators."""
    paragraphs = re.split(r"\n\s*\n", text.replace(SEPARATOR, ""))
    return "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if ">>>" not in paragraph).strip()
