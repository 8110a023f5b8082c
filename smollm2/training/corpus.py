"""Open the tokenizer and the tokens of a run, on one rank or on several."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from smollm2.config.reading import is_input_chosen
from smollm2.data.corpus import Corpus, Listener, open_corpus
from smollm2.data.store import Index, TokenStore, open_tokens
from smollm2.data.token_files import open_token_files
from smollm2.data.tokenizer import restore_tokenizer, tokenizer_from_text
from smollm2.errors import DataError
from smollm2.runtime.device import environment
from smollm2.training.setup import Setup


def share_corpus(setup: Setup) -> Corpus:
    """Return the tokenizer and the tokens on every rank.

    Rank 0 reads the text, which may be standard input; the other ranks open the tokens that it wrote. On a machine that
    has a cache of its own, the first rank reads the text there, with the same tokenizer; `start_facts` are compared
    afterwards. Raise DataError if a rank cannot find the tokens.
    """
    runtime, opened, made = setup.runtime, None, None
    listener = Listener(setup.report, setup.console.show_progress, runtime.stop.raise_if_set)
    with runtime.together():
        if runtime.rank == 0:
            opened = open_corpus(
                setup.config,
                listener,
                is_chosen=is_input_chosen(setup.config, setup.origins),
                saved=restore_tokenizer(setup.start.state) if setup.start else None,
            )
            made = (
                opened.tokenizer.text,
                opened.tokenizer.end_of_text,
                opened.tokenizer.files,
                opened.names,
                [Place.of(store) for store in opened.stores],
                Place.of(opened.regression) if opened.regression else None,
            )
    text, end_of_text, files, names, places, other = runtime.gather(made)[0]
    tokenizer = tokenizer_from_text(text, end_of_text, files)

    def find() -> Corpus:
        stores = tuple(find_tokens(place) for place in places)
        return Corpus(tokenizer, names, stores, find_tokens(other) if other else None)

    with contextlib.suppress(DataError):
        opened = opened or find()
    if all(runtime.gather(opened is not None)):
        assert opened
        return opened
    with runtime.together():
        if opened is None and environment().get("LOCAL_RANK") == "0":
            opened = open_corpus(setup.config, listener, is_chosen=True, saved=tokenizer)
    with runtime.together():
        return opened or find()


@dataclass(frozen=True)
class Place:
    """Where rank 0 opened the tokens of a source: the folder of a store, or token files of another project."""

    folder: Path
    index: Index
    files: tuple[Path, ...]
    other: "Place | None"

    @classmethod
    def of(cls, store: TokenStore) -> "Place":
        """Return the place of the tokens of a store."""
        files = tuple(piece.path for piece in store.files.stream.pieces) if store.files else ()
        return cls(store.folder, store.index, files, cls.of(store.other) if store.other else None)


def find_tokens(place: Place) -> TokenStore:
    """Return the tokens that rank 0 opened, as this rank finds them. Raise DataError if it cannot find them."""
    if place.files:
        store: TokenStore | None = TokenStore(place.folder, place.index, open_token_files(place.files))
    else:
        store = open_tokens(place.folder)
    if store is None:
        raise DataError(
            place.folder,
            "rank 0 has the tokens there, but this rank cannot find them",
            "set data.cache_dir to a folder that all ranks of a machine share",
        )
    return store.with_validation(find_tokens(place.other)) if place.other else store
