"""The files that `data.input` names: one file, those of a folder or a pattern, or those of a data set from the hub.

A file's kind follows from its name. In a folder or a pattern, files of other kinds are left out and counted; a file that
is named itself is read as text if its kind is unknown.
"""

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smollm2.errors import DataError

Kind = Literal["text", "rows", "table"]
"""How a file is read: as text, as one JSON object per line, or as the columns of a parquet file."""

KINDS: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "rows"),
    ".parquet": "table",
    **dict.fromkeys(
        (
            *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml"),
            *(".py", ".pyi", ".js", ".jsx", ".ts", ".tsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs"),
            *(".go", ".rs", ".rb", ".php", ".swift", ".kt", ".scala", ".sh", ".bash", ".sql", ".r", ".jl", ".lua"),
            *(".pl", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".dart", ".css", ".scss"),
            *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".json"),
        ),
        "text",
    ),
}
"""The kind of a file by the end of its name, in lower case, without `.gz` or `.zst`."""

COMPRESSIONS = (".gz", ".zst")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

TRAIN = re.compile(r"(?:^|[/._-])train(?:ing)?(?:[/._-]|$)")
OTHER_SPLIT = re.compile(r"(?:^|[/._-])(?:test|valid|validation|val|dev|eval)(?:[/._-]|$)")

CHOOSE_INPUT = "choose a file or a folder with --input_file"


@dataclass
class InputFiles:
    """The files to read, in the order of the bytes of their names, and what was left out."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # by the reason

    @property
    def bytes(self) -> int:
        """The size of all files together; compressed files count as they are."""
        return sum(path.stat().st_size for path in self.files)


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a file, or None if its name tells nothing."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return KINDS.get(Path(name).suffix)


def is_pattern(name: str) -> bool:
    """Return whether `name` is a glob and not the name of an existing file."""
    return glob.has_magic(name) and not os.path.lexists(name)


def is_hub_name(name: str) -> bool:
    """Return whether `name` may be a data set on the Hugging Face hub: `owner/name`, and no such file or folder."""
    return bool(HUB_NAME.fullmatch(name)) and kind_of(Path(name)) is None and not Path(name).parent.exists()


def find_files(name: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> InputFiles:
    """Return the files of a folder, searched recursively, or of a pattern.

    `include` and `exclude` are patterns for a file's name or its path below the folder; with `include`, files of any kind
    that match are read, and no others. Hidden files and folders are left out. Raise DataError if no file is left, or for a
    link that leads back to a folder above it, a pipe, or a folder that cannot be read.
    """
    found = InputFiles()
    root = Path(name)
    if is_pattern(name):
        matches = [Path(match) for match in glob.glob(name, recursive=True)]  # noqa: PTH207 - Path.glob takes no absolute pattern
        paths = [(path.as_posix(), path) for path in matches if not path.is_dir()]
    else:
        paths = [(path.relative_to(root).as_posix(), path) for path in walk(root, ())]
    for relative, path in sorted(paths, key=lambda pair: os.fsencode(pair[0])):
        reason = reason_to_leave_out(relative, path, include, exclude)
        if reason:
            found.left_out[reason] += 1
        else:
            check_regular(path)
            found.files.append(path)
    choose_training_split(found, [path for path in found.files if kind_of(path) in ("rows", "table")])
    if not found.files:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.left_out.most_common(5))
        what = f"no file to read there ({reasons} left out)" if reasons else "no file to read there"
        raise DataError(name, what, "name a folder with text, or set data.include to patterns such as '*.txt'")
    return found


def reason_to_leave_out(relative: str, path: Path, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Return why a file is not read; empty if it is."""
    if any(fits(relative, pattern) for pattern in exclude):
        return "excluded"
    if include:
        return "" if any(fits(relative, pattern) for pattern in include) else "not included"
    return "" if kind_of(path) else f"{path.suffix.lower() or 'without a suffix'}"


def fits(relative: str, pattern: str) -> bool:
    """Return whether a pattern matches a path below the folder, or the file's name alone."""
    return fnmatch.fnmatchcase(relative, pattern) or fnmatch.fnmatchcase(relative.rpartition("/")[2], pattern)


def walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the files below a folder, through links too. Hidden names are skipped.

    Raise DataError if a folder cannot be read, or if a link leads back to one of the folders `above`.
    """
    try:
        status = folder.stat()
        identity = status.st_dev, status.st_ino
        if identity in above:
            raise DataError(folder, "this link leads back to a folder above it", "remove the link")
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(folder, f"the folder cannot be read ({error.strerror})", "check its permissions") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if Path(entry.path).is_dir():  # entry.is_dir() raises for a link to itself
            yield from walk(Path(entry.path), (*above, identity))
        else:
            yield Path(entry.path)


def check_regular(path: Path) -> None:
    """Raise DataError if the path is not a regular file: reading a pipe, for example, would wait for a writer."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(
            path, f"the file cannot be read ({error.strerror})", "remove it, or name it in data.exclude"
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise DataError(path, f"this is {kind}, not a file", "remove it, or name it in data.exclude")


def choose_training_split(found: InputFiles, tables: Sequence[Path]) -> None:
    """Leave out those of the tables that belong to other splits, and the card, if one of them is of a training split."""
    names = {path: "/".join(path.parts[-2:]) for path in tables}
    if not any(map(TRAIN.search, names.values())):
        return
    for path, name in names.items():
        if OTHER_SPLIT.search(name) and not TRAIN.search(name):
            found.files.remove(path)
            found.left_out["of another split"] += 1
    for path in [path for path in found.files if path.name == "README.md"]:
        found.files.remove(path)
        found.left_out["data set card"] += 1
