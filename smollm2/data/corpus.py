"""The tokenizer and the tokens of a config: opened, or made and cached if they do not exist."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smollm2.config.schema import Config
from smollm2.data.sample import write_sample_corpus
from smollm2.data.sources import open_input, rules_of
from smollm2.data.store import TokenStore, prepare_tokens
from smollm2.data.text import Source, do_nothing
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.data.windows import Windows
from smollm2.storage.atomic import probe_folder, write_atomically


@dataclass(frozen=True)
class Listener:
    """Who hears of the work: `report` gets lines, `show_progress` a label and a fraction; `stop` may raise to end it."""

    report: Callable[[str], None]
    show_progress: Callable[[str, float], None]
    stop: Callable[[], None] = do_nothing


def open_corpus(
    config: Config, listener: Listener, *, is_chosen: bool, saved: Tokenizer | None = None
) -> tuple[Tokenizer, TokenStore]:
    """Return the tokenizer and the tokens; create them if they do not exist.

    `is_chosen` tells whether the user named the input: if not, a sample corpus is made in its place. `saved` is the
    tokenizer of a checkpoint. Raise DataError, ConfigError or ResourceError.
    """
    data = config.data
    if not is_chosen and not Path(data.input).exists():
        made = write_sample_corpus(Path(data.input))
        listener.report(f"{data.input}: missing, so a sample corpus is made: {made}")
    text = open_source(config, data.input, listener)
    held_out = open_source(config, data.validation_input, listener) if data.validation_input else None
    tokenizer = saved or find_tokenizer(config, text, listener)
    store = tokenize(config, text, tokenizer, data.held_out_fraction, listener)
    if held_out:
        store = store.with_validation(tokenize(config, held_out, tokenizer, 0.0, listener))
    return tokenizer, store


def open_source(config: Config, name: str, listener: Listener) -> Source:
    """Return the documents that an input stands for, and report what was found there."""
    cache, rules = Path(config.data.cache_dir), rules_of(config.data)
    source = open_input(name, cache, rules, stop=listener.stop, report=listener.report)
    for note in source.notes:
        listener.report(note)
    return source


def find_tokenizer(config: Config, text: Source, listener: Listener) -> Tokenizer:
    """Return the tokenizer that the config names; for `auto`, one trained on the text, which is kept in the cache."""
    data, cache = config.data, Path(config.data.cache_dir)
    if data.tokenizer != "auto":
        return load_tokenizer(data.tokenizer, report=listener.report)
    vocab_size = config.model.vocab_size
    key = hashlib.sha256(f"1 {text.sha256} {text.separator} {vocab_size}".encode()).hexdigest()
    trained = cache / f"tokenizer-{key[:32]}.json"
    if not trained.exists():
        listener.report(f"training a tokenizer of up to {vocab_size:,} entries on {text.name}")
        made = train_tokenizer(text.sample(stop=listener.stop), vocab_size)
        probe_folder(cache, "data.cache_dir")
        write_atomically(trained, made.text.encode())
    return tokenizer_from_text(trained.read_text(encoding="utf-8"))


def tokenize(
    config: Config, source: Source, tokenizer: Tokenizer, validation_fraction: float, listener: Listener
) -> TokenStore:
    """Return the tokens of a source, from the cache or newly made."""
    store = prepare_tokens(
        source,
        tokenizer,
        Path(config.data.cache_dir),
        validation_fraction,
        show_progress=lambda fraction: listener.show_progress("tokenizing", fraction),
        stop=listener.stop,
    )
    for note in store.notes:
        listener.report(note)
    return store


def training_windows(config: Config, tokenizer: Tokenizer, store: TokenStore) -> Windows:
    """Return the windows of a run over its training tokens."""
    data, length = config.data, config.training.sequence_length
    end_of_text = tokenizer.end_of_text if data.document_mask else None
    return Windows(store.train, length, data.stride, tokenizer.vocab_size, end_of_text)
