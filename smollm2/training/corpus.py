"""Open the tokenizer and the tokens of a run, on one rank or on several."""

from pathlib import Path

from smollm2.config.reading import is_input_chosen
from smollm2.data.corpus import Listener, open_corpus
from smollm2.data.store import TokenStore, open_tokens
from smollm2.data.tokenizer import Tokenizer, tokenizer_from_text
from smollm2.errors import DataError
from smollm2.training.setup import Setup


def share_corpus(setup: Setup) -> tuple[Tokenizer, TokenStore]:
    """Return the tokenizer and the tokens on every rank.

    Only rank 0 reads the text, which may be standard input; the other ranks open the tokens that it wrote. Raise
    DataError if a rank cannot find them.
    """
    runtime, opened, made = setup.runtime, None, None
    with runtime.together():
        if runtime.rank == 0:
            saved = setup.start.state["tokenizer"] if setup.start else None
            opened = open_corpus(
                setup.config,
                Listener(setup.report, setup.console.show_progress, runtime.stop.raise_if_set),
                is_chosen=is_input_chosen(setup.config, setup.origins),
                saved=tokenizer_from_text(saved["text"], saved["end_of_text"]) if saved else None,
            )
            tokenizer, store = opened
            made = (tokenizer.text, tokenizer.end_of_text, store.folder, store.validation_folder)
    text, end_of_text, folder, validation_folder = runtime.gather(made)[0]
    with runtime.together():
        if opened is None:
            store = find_tokens(folder)
            if validation_folder:
                store = store.with_validation(find_tokens(validation_folder))
            opened = tokenizer_from_text(text, end_of_text), store
    return opened


def find_tokens(folder: Path) -> TokenStore:
    """Return the tokens that rank 0 wrote to `folder`. Raise DataError if this rank cannot find them."""
    store = open_tokens(folder)
    if store is None:
        raise DataError(
            folder,
            "rank 0 wrote the tokens there, but this rank cannot find them",
            "set data.cache_dir to a folder that all machines share",
        )
    return store
