"""Write the tokens of a text to the cache. A build that was killed is continued after its last complete shard.

The shards are written in the hidden folder `.<fingerprint>.partial`, which one process holds by a lock and which gets its
name at the end. What is written depends on the text and the tokenizer alone: a build that was continued, or that used
another number of threads, gives the same bytes.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from smollm2.data.documents import FEWEST_TOKENS, Source, do_nothing
from smollm2.data.encoding import BATCH, Encoded, Encoder, arrange, encode_in_order
from smollm2.data.shards import Shard, ShardWriter
from smollm2.data.statistics import summarize_documents
from smollm2.data.store import INDEX, Index, Statistics, TokenStore, fingerprint_of, open_tokens
from smollm2.data.stream import choose_dtype
from smollm2.data.text import expand_home
from smollm2.data.tokenizer_files import TOKENIZER
from smollm2.errors import DataError, ResourceError
from smollm2.plan.machine import count_cores
from smollm2.storage.atomic import IO_OPS, sync_file, write_atomically
from smollm2.storage.locks import is_held, lock_folder

SHARD_CHARACTERS = 2**26
"""Characters in a shard: at most this much work is lost if the process is killed."""

MOST_SHARDS = 2048
"""A text that would need more shards gets longer ones."""

STATE = "state.json"

UNKNOWN_REFUSED = 0.05

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class State:
    """How far a build is at its last complete shard."""

    chunks: int = 0
    characters: int = 0
    documents: int = 0
    unknown_bytes: int = 0
    unknown_documents: int = 0
    unknown_here: int = 0  # in the document that has not ended
    train: list[Shard] = field(default_factory=list)
    validation: list[Shard] = field(default_factory=list)

    def count(self, chunk: Encoded) -> None:
        """Count a chunk that was written."""
        self.chunks, self.characters = self.chunks + 1, self.characters + chunk.characters
        self.unknown_bytes, self.unknown_here = (
            n + chunk.unknown_bytes for n in (self.unknown_bytes, self.unknown_here)
        )
        if chunk.last:
            self.documents += 1
            self.unknown_documents += self.unknown_here > 0
            self.unknown_here = 0

    @classmethod
    def read(cls, path: Path) -> "State":
        """Return the state of an earlier build, or that of a new one if there is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            shards = {name: [Shard(**shard) for shard in values[name]] for name in ("train", "validation")}
            state = cls(**{**values, **shards})
            whole = all((path.parent / shard.file).is_file() for shard in (*state.train, *state.validation))
        except (OSError, ValueError, TypeError, KeyError):
            return cls()
        return state if whole else cls()


def prepare_tokens(
    text: Source,
    tokenizer: Encoder,
    cache_dir: Path,
    validation_fraction: float,
    *,
    show_progress: Callable[[float], None] = lambda fraction: None,
    report: Callable[[str], None] = lambda message: None,
    stop: Callable[[], None] = do_nothing,
    workers: int = 0,
    shard_characters: int = SHARD_CHARACTERS,
) -> TokenStore:
    """Return the tokens of `text`, from the cache, or encoded by `workers` threads (0: one per core) and then cached.

    `stop` is called often and may raise. Adds at most 300 MB to the memory of the process, for a text of any size. Raise
    DataError if the tokenizer cannot represent the text, ResourceError if the cache cannot be written.
    """
    cache_dir = expand_home(cache_dir)
    folder = cache_dir / fingerprint_of(text, tokenizer, validation_fraction)
    try:
        store = open_tokens(folder)
        if store is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            size = max(shard_characters, text.characters // MOST_SHARDS)
            build = Build(text, tokenizer, folder, validation_fraction, size, workers or count_cores())
            build.run(show_progress, report, stop)
            store = open_tokens(folder)
    except OSError as error:
        advice = "free some space, or set data.cache_dir to a writable folder"
        raise ResourceError(cache_dir, f"the tokens cannot be written there ({error.strerror})", advice) from None
    assert store is not None
    return store


@dataclass(frozen=True)
class Build:
    """The writing of one store."""

    text: Source
    tokenizer: Encoder
    folder: Path
    fraction: float
    shard_characters: int
    workers: int

    @cached_property
    def held_out(self) -> bytearray:
        """1 for each document that is held out for validation, else 0."""
        return self.text.documents.hold_out(self.fraction)

    @property
    def work(self) -> Path:
        """The folder in which the store is written."""
        return self.folder.with_name(f".{self.folder.name}.partial")

    def run(
        self, show_progress: Callable[[float], None], report: Callable[[str], None], stop: Callable[[], None]
    ) -> None:
        """Write the store, or wait until another process has written it."""
        with hold(self.work, report, stop):
            if open_tokens(self.folder) is not None:  # another process was faster
                shutil.rmtree(self.work, ignore_errors=True)
                return
            try:
                self.write(show_progress, stop)
            except (DataError, OSError):  # continuing would fail again, or the disk is full
                shutil.rmtree(self.work, ignore_errors=True)
                raise
            except BaseException:
                if not (self.work / STATE).exists():
                    shutil.rmtree(self.work, ignore_errors=True)
                raise

    def write(self, show_progress: Callable[[float], None], stop: Callable[[], None]) -> None:
        """Write all shards and the index, and give the folder its name."""
        state = State.read(self.work / STATE)
        self.write_shards(state, show_progress, stop)
        index = self.make_index(state)
        (self.work / INDEX).write_text(index.to_json(), encoding="utf-8")
        (self.work / TOKENIZER).write_text(self.tokenizer.text, encoding="utf-8", newline="")
        for name in (INDEX, TOKENIZER):
            sync_file(self.work / name)
        shards = (shard.file for shard in (*index.train, *index.validation))
        kept = {INDEX, TOKENIZER, "train.ends", "validation.ends", *shards}
        for path in self.work.iterdir():  # the state, the lock, and what a killed build left
            if path.name not in kept:
                path.unlink()
        if self.folder.exists():  # damaged, or written by an earlier version
            shutil.rmtree(self.folder)
        self.work.rename(self.folder)
        IO_OPS.fsync_dir(self.folder.parent)

    def write_shards(self, state: State, show_progress: Callable[[float], None], stop: Callable[[], None]) -> None:
        """Write the shards that are missing in `state`."""
        held_out = self.held_out
        dtype = choose_dtype(self.tokenizer.vocab_size, marks=self.tokenizer.marks_targets)
        facts = (self.tokenizer.vocab_size, self.tokenizer.fingerprint, dtype)
        train = ShardWriter(self.work, "train", *facts, state.train)
        validation = ShardWriter(self.work, "validation", *facts, state.validation)
        with contextlib.closing(train), contextlib.closing(validation):
            begun = shown = state.characters
            parts = arrange(self.text.chunks(stop), cuts=self.tokenizer.cuts_documents)
            chunks = islice(parts, state.chunks, None)
            encoded = encode_in_order(chunks, self.tokenizer, self.workers, self.text.name)
            with contextlib.closing(encoded):
                for chunk in encoded:
                    writer = validation if held_out[state.documents] else train
                    writer.write(chunk.ids, ends_document=chunk.last)
                    state.count(chunk)
                    done = state.characters
                    if done - begun >= self.shard_characters:
                        begun = done
                        self.finish_shards(state, train, validation)
                    if done - shown >= BATCH:
                        shown = done
                        show_progress(min(0.999, done / self.text.characters))
                    stop()
            self.refuse_unknown(state)
            train.finish_shard(is_last=True)
            validation.finish_shard(is_last=True)
        show_progress(1.0)

    def finish_shards(self, state: State, *writers: ShardWriter) -> None:
        """Complete a shard of each split, and record that."""
        for writer in writers:
            writer.finish_shard()
        write_atomically(self.work / STATE, json.dumps(asdict(state)).encode())

    def refuse_unknown(self, state: State) -> None:
        """Raise DataError if the tokenizer cannot represent much of the text."""
        statistics = self.statistics(state, 0)
        if statistics.unknown_share > UNKNOWN_REFUSED:
            advice = "use another tokenizer, such as `auto` or `bytes`"
            raise DataError(self.text.name, statistics.describe_unknown(), advice)

    def statistics(self, state: State, held_out: int) -> Statistics:
        """Return the counts; `held_out` counts the validation tokens at the end of the training shards."""
        train, validation = (sum(s.tokens for s in shards) for shards in (state.train, state.validation))
        return Statistics(
            characters=state.characters,
            bytes=self.text.size,
            documents=state.documents,
            blank_documents=self.text.blank_documents,
            tokens=train + validation,
            unknown_bytes=state.unknown_bytes,
            unknown_documents=state.unknown_documents,
            train_tokens=train - held_out,
            validation_tokens=validation + held_out,
        )

    def make_index(self, state: State) -> Index:
        """Return the index of the complete shards."""
        total, held_out = sum(shard.tokens for shard in state.train), 0
        if self.fraction > 0 and not self.text.documents.is_split(self.fraction):
            held_out = max(FEWEST_TOKENS, round(total * self.fraction))
            held_out = held_out if total - held_out >= 2 else 0
        documents = self.text.documents
        return Index(
            fingerprint=self.folder.name,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer=self.tokenizer.fingerprint,
            end_of_text=self.tokenizer.end_of_text,
            held_out=held_out,
            statistics=self.statistics(state, held_out),
            summary=summarize_documents(documents.characters, self.count_tokens(), documents.hashes),
            train=state.train,
            validation=state.validation,
            marks_targets=self.tokenizer.marks_targets,
        )

    def count_tokens(self) -> np.ndarray:
        """Return the number of tokens of each document, in the order of the text."""
        held_out = np.frombuffer(self.held_out, np.uint8).astype(bool)
        tokens = np.zeros(len(held_out), np.uint64)
        for split, chosen in (("train", ~held_out), ("validation", held_out)):
            ends = np.fromfile(self.work / f"{split}.ends", "<u8")
            tokens[chosen] = np.diff(ends, prepend=np.uint64(0))
        return tokens


@contextlib.contextmanager
def hold(folder: Path, report: Callable[[str], None], stop: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of the folder, and wait for it if another process on this machine has it."""
    is_reported = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_folder(folder, "data.cache_dir"))
                break
            except ResourceError:
                if not is_held(folder):
                    raise
            if not is_reported:
                report(f"{folder.parent}: waiting for another process that is writing the same tokens")
                is_reported = True
            stop()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        yield
