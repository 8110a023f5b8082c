"""The tokenizer and the tokens of a config: opened, or made and cached if they do not exist."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from smollm2.config.initial_model import find_model_folder
from smollm2.config.mixture import list_stages
from smollm2.config.schema import Config
from smollm2.data.batches import Batches
from smollm2.data.building import prepare_tokens
from smollm2.data.chat import END, START, TEMPLATES, ChatEncoder, DocumentEncoder, choose_template, with_chat
from smollm2.data.documents import Source, do_nothing
from smollm2.data.encoding import Encoder
from smollm2.data.mixing import ONE_SOURCE, MixtureSchedule
from smollm2.data.packing import ConversationWindows, PackedWindows, Packs, open_packs, pack_documents, save_packs
from smollm2.data.sample import write_sample_corpus
from smollm2.data.sources import open_input, rules_of
from smollm2.data.store import Statistics, TokenStore
from smollm2.data.token_inputs import find_token_input, open_token_input, read_tokenizer
from smollm2.data.tokenizer import BYTES, Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.data.tokenizer_files import TOKENIZER
from smollm2.data.windows import TokenWindows, Windows
from smollm2.errors import DataError
from smollm2.storage.atomic import probe_folder, write_atomically
from smollm2.storage.input_files import is_pattern
from smollm2.storage.run_folder import TOKENIZER as FOLDER_OF_TOKENIZER

TOKENIZER_SAMPLE = 50_000_000
"""Bytes of text on which a tokenizer is trained, in equal parts from all sources."""

MANY_EPOCHS = 4
"""Up to this many epochs, repeated text is nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class Listener:
    """Who hears of the work: `report` gets lines, `show_progress` a label, a fraction and the number of bytes of the
    whole; `stop` may raise to end it."""

    report: Callable[[str], None]
    show_progress: Callable[[str, float, int], None]
    stop: Callable[[], None] = do_nothing


@dataclass(frozen=True)
class Corpus:
    """The tokenizer of a run, and the name and the tokens of each of its sources."""

    tokenizer: Tokenizer
    names: tuple[str, ...]
    stores: tuple[TokenStore, ...]
    regression: TokenStore | None = None  # the text that must not get worse

    @property
    def fingerprint(self) -> str:
        """What the tokens of all sources were made of."""
        found = [store.fingerprint for store in self.stores]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()

    @property
    def is_chat(self) -> bool:
        """Whether the sources are conversations."""
        return any(store.index.marks_targets for store in self.stores)

    @property
    def train_tokens(self) -> int:
        """The number of tokens to train on."""
        return sum(len(store.train) for store in self.stores)

    @property
    def validation_tokens(self) -> int:
        """The number of tokens that are held out."""
        return sum(len(store.validation) for store in self.stores)

    @property
    def statistics(self) -> Statistics:
        """The counts of all sources together."""
        parts = [asdict(store.statistics) for store in self.stores]
        return Statistics(**{name: sum(part[name] for part in parts) for name in parts[0]})

    @property
    def bytes_per_token(self) -> float:
        """The bytes of text per token; of token files of another project nothing is known, and they are left out."""
        known = [store.statistics for store in self.stores if store.statistics.bytes]
        return sum(s.bytes for s in known) / sum(s.tokens for s in known) if known else float("nan")

    def batches(self, config: Config) -> Batches:
        """Return the batches of a run over the training tokens."""
        windows = [training_windows(config, self.tokenizer, store) for store in self.stores]
        return Batches(windows, config.training.seed, config.global_batch_size, make_schedule(config))

    def describe(self, batches: Batches) -> Iterator[str]:
        """Yield for each source the line that shows that no part of it is lost."""
        for name, store, windows in zip(self.names, self.stores, batches.windows.sources, strict=True):
            line = store.statistics.describe(windows)
            prefix = f"{name}: " if len(self.stores) > 1 else ""
            yield prefix + line
            if isinstance(windows, PackedWindows):
                yield f"{prefix}packed into {windows.packs.describe()}"


def open_corpus(config: Config, listener: Listener, *, is_chosen: bool, saved: Tokenizer | None = None) -> Corpus:
    """Return the tokenizer and the tokens; create them if they do not exist.

    `is_chosen` tells whether the user named the input: if not, a sample corpus is made in its place. `saved` is the
    tokenizer of a checkpoint. Raise DataError, ConfigError or ResourceError.
    """
    data = config.data
    if not is_chosen and not Path(data.input).exists():
        made = write_sample_corpus(Path(data.input))
        listener.report(f"{data.input}: missing, so a sample corpus is made: {made}")
    inputs = [open_data_input(config, name, listener) for name in data.inputs]
    held_out = open_data_input(config, data.validation_input, listener) if data.validation_input else None
    tokenizer = saved or find_tokenizer(config, inputs, listener).with_tokens(data.add_tokens)
    if any(is_chat(one) for one in (*inputs, held_out)):
        tokenizer = prepare_for_chat(config, tokenizer, inputs)
    encoder = plain_encoder(tokenizer, (*inputs, held_out))
    stores = [open_tokens_of(config, one, tokenizer, encoder, data.held_out_fraction, listener) for one in inputs]
    if held_out:
        other = open_tokens_of(config, held_out, tokenizer, encoder, 0.0, listener)
        stores = [stores[0].with_validation(other), *stores[1:]]
    regression = None
    if data.regression_input:
        text = open_data_input(config, data.regression_input, listener)
        regression = open_tokens_of(config, text, tokenizer, tokenizer, 0.0, listener)
    return Corpus(tokenizer, tuple(name_sources(data.inputs)), tuple(stores), regression)


def name_sources(inputs: Sequence[str]) -> Iterator[str]:
    """Yield a short name for each input: its file or folder, or the whole input if another one has the same."""
    short = []
    for name in inputs:
        plain = [part for part in Path(name).parts if not is_pattern(part)]
        short.append(Path(plain[-1]).stem.removesuffix(".jsonl") if plain else name)
    times = Counter(short)
    yield from (brief if brief and times[brief] == 1 else name for brief, name in zip(short, inputs, strict=True))


@dataclass(frozen=True)
class Tokenized:
    """An input that is tokens already: the folder of a store, or token files."""

    name: str
    paths: list[Path]


def open_data_input(config: Config, name: str, listener: Listener) -> Source | Tokenized:
    """Return the documents that an input stands for, and report what was found there; or the tokens that it is."""
    cache, rules = Path(config.data.cache_dir), rules_of(config.data)
    if paths := find_token_input(name):
        return Tokenized(name, paths)
    source = open_input(name, cache, rules, stop=listener.stop, report=listener.report)
    for note in source.notes:
        listener.report(note)
    return source


def find_tokenizer(config: Config, inputs: Sequence[Source | Tokenized], listener: Listener) -> Tokenizer:
    """Return the tokenizer that the config names; for `auto`, one trained on the texts, which is kept in the cache.

    If an input is a token store, `auto` is the store's tokenizer.
    """
    data, cache = config.data, Path(config.data.cache_dir)
    if config.model.init_from:
        return load_initial_tokenizer(config.model.init_from, listener.report)
    if data.tokenizer != "auto":
        return load_tokenizer(data.tokenizer, report=listener.report)
    for one in inputs:
        if isinstance(one, Tokenized):
            return read_tokenizer(one.paths)
    texts = [one for one in inputs if isinstance(one, Source)]
    vocab_size = config.model.vocab_size
    rule = " ".join(f"{text.sha256} {text.separator}" for text in texts)
    key = hashlib.sha256(f"2 {rule} {vocab_size}".encode()).hexdigest()
    trained = cache / f"tokenizer-{key[:32]}.json"
    if not trained.exists():
        names = ", ".join(text.name for text in texts)
        listener.report(f"training a tokenizer of up to {vocab_size:,} entries on {names}")
        limit = TOKENIZER_SAMPLE // len(texts)
        made = train_tokenizer(chain.from_iterable(text.sample(limit, listener.stop) for text in texts), vocab_size)
        probe_folder(cache, "data.cache_dir")
        write_atomically(trained, made.text.encode())
    return tokenizer_from_text(trained.read_text(encoding="utf-8"))


def is_chat(source: Source | Tokenized | None) -> bool:
    """Return whether an input holds conversations."""
    return isinstance(source, Source) and source.is_chat


def plain_encoder(tokenizer: Tokenizer, sources: Iterable[Source | Tokenized | None]) -> Encoder:
    """Return what encodes the plain text among these sources."""
    return DocumentEncoder(tokenizer) if any(is_chat(source) for source in sources) else tokenizer


def prepare_for_chat(config: Config, tokenizer: Tokenizer, inputs: Sequence[Source | Tokenized]) -> Tokenizer:
    """Return the tokenizer of a chat model. Raise DataError if an input is tokens already, or the template is unusable."""
    if tokens := [one.name for one in inputs if isinstance(one, Tokenized)]:
        what = "tokens that another program made cannot be mixed with conversations"
        raise DataError(tokens[0], what, "give the text itself")
    if config.data.tokenizer in ("auto", BYTES) and not config.model.init_from:
        tokenizer = tokenizer.with_tokens((START, END))
    return with_chat(choose_template(tokenizer, read_template(config.data.chat_template)))


def read_template(name: str | None) -> str | None:
    """Return the chat template that the config names: a known name as it is, or the content of a file."""
    if name is None or name in TEMPLATES:
        return name
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        what = f"the template {name} cannot be read ({reason})"
        raise DataError("data.chat_template", what, f"use {' or '.join(TEMPLATES)}, or the path of a file") from None


def load_initial_tokenizer(name: str, report: Callable[[str], None] = lambda message: None) -> Tokenizer:
    """Return the tokenizer of the model that a run starts from."""
    folder = find_model_folder(name, report)
    return load_tokenizer(str(folder if (folder / TOKENIZER).exists() else folder / FOLDER_OF_TOKENIZER))


def open_tokens_of(
    config: Config,
    source: Source | Tokenized,
    tokenizer: Tokenizer,
    encoder: Encoder,
    validation_fraction: float,
    listener: Listener,
) -> TokenStore:
    """Return the tokens of a source, in place, from the cache or newly made; plain text is encoded by `encoder`."""
    if isinstance(source, Tokenized):
        return open_token_input(source.name, source.paths, tokenizer, validation_fraction, listener.report)
    if source.is_chat:
        encoder = ChatEncoder(choose_template(tokenizer), config.data.train_on)
    store = prepare_tokens(
        source,
        encoder,
        Path(config.data.cache_dir),
        validation_fraction,
        show_progress=lambda fraction: listener.show_progress("tokenizing", fraction, source.size),
        report=listener.report,
        stop=listener.stop,
    )
    for note in store.notes:
        listener.report(note)
    return store


def make_schedule(config: Config) -> MixtureSchedule:
    """Return which source each window of the run is drawn from."""
    data = config.data
    if not data.mixture:
        return ONE_SOURCE
    starts = [step * config.global_batch_size for step in config.stage_steps]
    return MixtureSchedule(list_stages(data.mixture, len(starts)), starts)


def training_windows(config: Config, tokenizer: Tokenizer, store: TokenStore) -> TokenWindows:
    """Return the windows of a run over the training tokens of a source."""
    data, length = config.data, config.training.sequence_length
    if store.index.marks_targets:
        return ConversationWindows(store.train, find_packs(config, store), tokenizer.vocab_size)
    end_of_text = tokenizer.document_end if data.document_mask else None
    if data.pack == "best_fit":
        return PackedWindows(store.train, find_packs(config, store), tokenizer.vocab_size, end_of_text)
    return Windows(store.train, length, data.stride, tokenizer.vocab_size, end_of_text)


def find_packs(config: Config, store: TokenStore) -> Packs:
    """Return which documents each packed window holds, from the cache or newly made."""
    length = config.training.sequence_length
    path = Path(config.data.cache_dir) / f"packs-{store.fingerprint[:32]}-{length}.bin"
    packs = open_packs(path)
    if packs is None or packs.tokens != len(store.train):
        ends = store.splits[0].ends
        if ends is None:
            what = "best_fit needs to know where documents end, and these token files have no index"
            raise DataError("data.pack", what, "set it to windows")
        packs = pack_documents(ends, length)
        probe_folder(path.parent, "data.cache_dir")
        save_packs(packs, path)
    return packs


def validation_windows(config: Config, tokenizer: Tokenizer, store: TokenStore) -> TokenWindows | None:
    """Return the windows of the held-out tokens of a source, or None if there is no target in them."""
    return evaluation_windows(config, tokenizer, *((store.other, 0) if store.other else (store, 1)))


def evaluation_windows(config: Config, tokenizer: Tokenizer, store: TokenStore, split: int) -> TokenWindows | None:
    """Return the windows of a split of a store that is not trained on, or None if there is no target in them."""
    tokens, ends = store.splits[split]
    length = config.training.sequence_length
    if len(tokens) < 2:
        return None
    if store.index.marks_targets:
        assert ends is not None
        return ConversationWindows(tokens, pack_documents(ends, length), tokenizer.vocab_size)
    end_of_text = tokenizer.document_end if config.data.document_mask else None
    return Windows(tokens, length, length, tokenizer.vocab_size, end_of_text)
