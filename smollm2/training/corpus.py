"""Open the text, the tokenizer and the tokens of a run, on one rank or on several."""

import hashlib
from pathlib import Path

from smollm2.data.sample import write_sample_corpus
from smollm2.data.sources import Source, open_input, rules_of
from smollm2.data.store import TokenStore, open_tokens, prepare_tokens
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.errors import DataError
from smollm2.storage.atomic import probe_folder, write_atomically
from smollm2.training.setup import Setup


def share_corpus(setup: Setup) -> tuple[Tokenizer, TokenStore]:
    """Return the tokenizer and the tokens on every rank.

    Only rank 0 reads the text, which may be standard input; the other ranks open the tokens that it wrote. Raise
    DataError if a rank cannot find them.
    """
    runtime, opened, made = setup.runtime, None, None
    with runtime.together():
        if runtime.rank == 0:
            opened = open_corpus(setup)
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


def open_corpus(setup: Setup) -> tuple[Tokenizer, TokenStore]:
    """Return the tokenizer and the tokens; create them if they do not exist."""
    data, cache = setup.config.data, Path(setup.config.data.cache_dir)
    stop = setup.runtime.stop.raise_if_set
    is_chosen = data.input != "input.txt" or setup.origins.get("data.input", "default").startswith("--")
    if not is_chosen and not Path(data.input).exists():
        setup.report(f"{data.input}: missing, so a sample corpus is made: {write_sample_corpus(Path(data.input))}")
    text, held_out = open_source(setup, data.input), None
    if data.validation_input:
        held_out = open_source(setup, data.validation_input)
    if setup.start:
        saved = setup.start.state["tokenizer"]
        tokenizer = tokenizer_from_text(saved["text"], saved["end_of_text"])
    elif data.tokenizer != "auto":
        tokenizer = load_tokenizer(data.tokenizer, report=setup.report)
    else:
        vocab_size = setup.config.model.vocab_size
        key = hashlib.sha256(f"1 {text.sha256} {text.separator} {vocab_size}".encode()).hexdigest()
        trained = cache / f"tokenizer-{key[:32]}.json"
        if not trained.exists():
            setup.report(f"training a tokenizer of up to {vocab_size:,} entries on {text.name}")
            made = train_tokenizer(text.sample(stop=stop), vocab_size)
            probe_folder(cache, "data.cache_dir")
            write_atomically(trained, made.text.encode())
        tokenizer = tokenizer_from_text(trained.read_text(encoding="utf-8"))
    store = tokenize(setup, text, tokenizer, 0.0 if held_out else data.validation_fraction)
    return tokenizer, store.with_validation(tokenize(setup, held_out, tokenizer, 0.0)) if held_out else store


def open_source(setup: Setup, name: str) -> Source:
    """Return the documents that an input stands for, and report what was found there."""
    stop, cache = setup.runtime.stop.raise_if_set, Path(setup.config.data.cache_dir)
    source = open_input(name, cache, rules_of(setup.config.data), stop=stop, report=setup.report)
    for note in source.notes:
        setup.report(note)
    return source


def tokenize(setup: Setup, source: Source, tokenizer: Tokenizer, validation_fraction: float) -> TokenStore:
    """Return the tokens of a source, from the cache or newly made."""
    store = prepare_tokens(
        source,
        tokenizer,
        Path(setup.config.data.cache_dir),
        validation_fraction,
        show_progress=lambda fraction: setup.console.show_progress("tokenizing", fraction),
        stop=setup.runtime.stop.raise_if_set,
    )
    for note in store.notes:
        setup.report(note)
    return store
