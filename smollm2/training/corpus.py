"""Open the text, the tokenizer and the tokens of a run, on one rank or on several."""

import hashlib
from pathlib import Path

from smollm2.data.sample import write_sample_corpus
from smollm2.data.sources import open_input, rules_of
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
            made = (opened[0].text, opened[0].end_of_text, str(opened[1].folder))
    text, end_of_text, folder = runtime.gather(made)[0]
    with runtime.together():
        if opened is None:
            store = open_tokens(Path(folder))
            if store is None:
                raise DataError(
                    folder,
                    "rank 0 wrote the tokens there, but this rank cannot find them",
                    "set data.cache_dir to a folder that all machines share",
                )
            opened = tokenizer_from_text(text, end_of_text), store
    return opened


def open_corpus(setup: Setup) -> tuple[Tokenizer, TokenStore]:
    """Return the tokenizer and the tokens; create them if they do not exist."""
    data, cache = setup.config.data, Path(setup.config.data.cache_dir)
    stop = setup.runtime.stop.raise_if_set
    is_chosen = data.input != "input.txt" or setup.origins.get("data.input", "default").startswith("--")
    if not is_chosen and not Path(data.input).exists():
        setup.report(f"{data.input}: missing, so a sample corpus is made: {write_sample_corpus(Path(data.input))}")
    text = open_input(data.input, cache, rules_of(data), stop=stop, report=setup.report)
    for note in text.notes:
        setup.report(note)
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
    store = prepare_tokens(
        text,
        tokenizer,
        cache,
        data.validation_fraction,
        show_progress=lambda fraction: setup.console.show_progress("tokenizing", fraction),
        stop=stop,
    )
    for note in store.notes:
        setup.report(note)
    return tokenizer, store
