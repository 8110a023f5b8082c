"""Open the text, the tokenizer and the tokens of a run, on one rank or on several."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from smollm2.config.schema import Config
from smollm2.data.sample import write_sample_corpus
from smollm2.data.store import TokenStore, open_tokens, prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.errors import (
    DataError,
)
from smollm2.runtime.device import Runtime
from smollm2.storage.atomic import probe_folder, write_atomically
from smollm2.tracking.console import ConsoleTracker
from smollm2.training.setup import State


def share_corpus(
    config: Config,
    runtime: Runtime,
    start: tuple[Path, State] | None,
    origins: Mapping[str, str],
    console: ConsoleTracker,
) -> tuple[Tokenizer, TokenStore]:
    """The tokenizer and the tokens. Rank 0 alone reads the text, which may be standard input; the others open what it
    made. Raises DataError where a rank cannot."""
    opened, made = None, None
    with runtime.together():
        if runtime.rank == 0:
            opened = open_corpus(config, runtime, start, origins, console)
            made = (opened[0].text, opened[0].end_of_text, str(opened[1].folder))
    text, end_of_text, folder = runtime.gather(made)[0]
    with runtime.together():
        if opened is None:
            store = open_tokens(Path(folder))
            if store is None:
                raise DataError(
                    f"{folder} - rank 0 has made the tokens there and this rank finds none - set data.cache_dir to a folder "
                    "that all machines share"
                )
            opened = tokenizer_from_text(text, end_of_text), store
    return opened


def open_corpus(
    config: Config,
    runtime: Runtime,
    start: tuple[Path, State] | None,
    origins: Mapping[str, str],
    console: ConsoleTracker,
) -> tuple[Tokenizer, TokenStore]:
    """The tokenizer and the tokens, made where they are absent."""
    data, cache = config.data, Path(config.data.cache_dir)
    stop = runtime.stop.raise_if_set
    asked_for = data.input != "input.txt" or origins.get("data.input", "default").startswith("--")
    if not asked_for and not Path(data.input).exists():
        console.say(f"{data.input}: not there, so the sample corpus is made: {write_sample_corpus(Path(data.input))}")
    text = open_text(data.input, cache, data.document_separator, stop=stop)
    for note in text.notes:
        console.say(note)
    if start:
        saved = start[1]["tokenizer"]
        tokenizer = tokenizer_from_text(saved["text"], saved["end_of_text"])
    elif data.tokenizer != "auto":
        tokenizer = load_tokenizer(data.tokenizer, report=console.say)
    else:
        key = hashlib.sha256(f"1 {text.sha256} {text.separator} {config.model.vocab_size}".encode()).hexdigest()
        trained = cache / f"tokenizer-{key[:32]}.json"
        if not trained.exists():
            console.say(f"training a tokenizer of up to {config.model.vocab_size:,} entries on {text.name}")
            made = train_tokenizer(text.sample(stop=stop), config.model.vocab_size)
            probe_folder(cache, "data.cache_dir")
            write_atomically(trained, made.text.encode())
        tokenizer = tokenizer_from_text(trained.read_text(encoding="utf-8"))
    store = prepare_tokens(
        text,
        tokenizer,
        cache,
        data.validation_fraction,
        show_progress=lambda f: console.show_progress("tokenizing", f),
        stop=stop,
    )
    for note in store.notes:
        console.say(note)
    return tokenizer, store
