"""Inputs that are tokens already: the folder of a token store, or token files of another project. No text is read."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from smollm2.data.store import INDEX, Index, Statistics, TokenStore, open_tokens
from smollm2.data.text import expand_home
from smollm2.data.token_files import is_token_file, open_token_files
from smollm2.data.tokenizer import Tokenizer, tokenizer_from_text
from smollm2.errors import ConfigError, DataError
from smollm2.storage.input_files import InputFiles, choose_training_split, find_files, is_pattern, kind_of, walk

MOST_HELD_OUT = 4_000_000
"""Tokens held out at the end of token files: the last validation reads all of them."""


def find_token_input(name: str) -> list[Path]:
    """Return the folder of a token store, or token files in the order of their names; nothing if `name` is neither.

    Of several token files, those that are named after another split than the training split are left out.
    """
    path = expand_home(name)
    if path.is_dir() and (path / INDEX).is_file():
        return [path]
    if path.is_dir():
        inside = list(walk(path, ()))
        if not any(map(is_token_file, inside)) or any(map(kind_of, inside)):
            return []
        files = [path for path in inside if is_token_file(path)]
    elif is_pattern(str(path)):
        files = find_files(str(path), include=["*.bin", "*.ds"]).files if name.endswith((".bin", ".ds")) else []
    else:
        files = [path] if is_token_file(path) else []
    found = InputFiles(sorted(files))
    choose_training_split(found, list(found.files))
    return found.files


def read_tokenizer(paths: list[Path]) -> Tokenizer:
    """Return the tokenizer in the folder of a token store. Raise ConfigError for token files, which have none."""
    if not (paths[0] / INDEX).is_file():
        what = "token files need the tokenizer that made them"
        raise ConfigError("data.tokenizer", f"{what} (got auto for {paths[0]})", "name its folder or its hub name")
    store = open_store(paths[0])
    try:
        text = (paths[0] / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(paths[0], "the store's tokenizer.json cannot be read", "copy the folder again") from None
    return tokenizer_from_text(text, store.index.end_of_text)


def open_store(folder: Path) -> TokenStore:
    """Return the token store in a folder. Raise DataError if it is damaged."""
    store = open_tokens(folder)
    if store is None:
        raise DataError(folder, f"{INDEX} is damaged, or does not fit the files beside it", "copy the folder again")
    return store


def open_token_input(
    name: str, paths: list[Path], tokenizer: Tokenizer, validation_fraction: float, report: Callable[[str], None]
) -> TokenStore:
    """Return the tokens of `find_token_input`. Raise DataError if they are damaged or another tokenizer made them."""
    if (paths[0] / INDEX).is_file():
        store = open_store(paths[0])
        if store.index.tokenizer != tokenizer.fingerprint:
            what = f"another tokenizer than {tokenizer.name} made these tokens"
            raise DataError(name, what, "set data.tokenizer to auto, which takes the one in the folder")
        report(f"{name}: a token store of {store.statistics.tokens:,} tokens")
        return store
    files = open_token_files(paths)
    count = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    made = f", made with the tokenizer {files.tokenizer_name}" if files.tokenizer_name else ""
    report(f"{name}: {count} of {len(files):,} tokens ({files.format}{made})")
    held_out = min(MOST_HELD_OUT, round(len(files) * validation_fraction))
    rule = f"{files.fingerprint} {tokenizer.fingerprint} {held_out}"
    documents = 0 if files.ends is None else len(files.ends)
    counts = dict.fromkeys(("characters", "bytes", "blank_documents", "unknown_bytes", "unknown_documents"), 0)
    index = Index(
        fingerprint=hashlib.sha256(rule.encode()).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        end_of_text=tokenizer.end_of_text,
        held_out=held_out,
        statistics=Statistics(
            **counts,
            documents=documents,
            tokens=len(files),
            train_tokens=len(files) - held_out,
            validation_tokens=held_out,
        ),
        summary={},
        train=[],
        validation=[],
    )
    return TokenStore(paths[0].parent, index, files)
