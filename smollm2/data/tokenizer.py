"""Text to ids and back: a byte-level BPE trained on the corpus, raw bytes, or any `tokenizer.json`.

`encode` adds no tokens and treats the text of a special token as plain text. tiktoken encodes if it is provably exact:
ByteLevel with or without Digits, no normalizer, and every merge result alone encodes to itself. By induction over token
length, both algorithms then make the same merges in the same order. A text on which tiktoken would panic (a byte
without a token, a very long run of spaces; the panic is a BaseException) is detected beforehand and encoded by
`tokenizers`. Text that a tokenizer cannot encode becomes its unknown id, or is dropped without one, and is counted.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from smollm2.config.hub import TOKENIZER, fetch_from_hub
from smollm2.data.sampling import limit_words, split_long_runs
from smollm2.data.text import END_OF_TEXT, expand_home
from smollm2.data.token_bytes import count_unknown, list_token_bytes, map_bytes, measure_tokens
from smollm2.data.tokenizer_files import (
    TOKENIZER_CONFIG,
    Files,
    find_chat_template,
    find_end_of_text,
    list_stops,
    read_files,
)
from smollm2.errors import DataError

BYTES = "bytes"
ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Names of the end-of-text token, in order of preference, for a tokenizer whose own config gives none."""

MAX_VOCAB_SIZE = 2**21
LONG_SPACE = re.compile(r"\s{131072}")
"""tiktoken's regex engine overflows its stack between 262,144 and 1,048,576 spaces in a row (0.14, measured)."""

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA_3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUT_SAFELY = {PATTERN, DIGITS_PATTERN, LLAMA_3_PATTERN, LLAMA_3_PATTERN.replace("{1,3}", "")}
"""Patterns of pre-tokenizers that split at every place where text.py may cut; the last one is Qwen's."""

FAST_FROM = 100_000
"""Characters after which the fast encoder pays: preparing it for SmolLM2's tokenizer takes 1 s, as long as encoding 1 MB
without it."""

PROBE = "It's 3.14,  we'll\r\n\r\n\tsee\u3000\u0085x ²½ éa\u0301 漢字 \U0001f600  9 <|endoftext|> ___\n \n  end  "


class Tokenizer:
    """A tokenizer. Build it with `load_tokenizer`, `tokenizer_from_text` or `train_tokenizer`.

    `text` is the content of tokenizer.json, or 'bytes'; `files` are those beside it in a model's folder. A checkpoint needs
    only these two and `end_of_text`. `bytes_per_token` (V,) is the number of UTF-8 bytes that each id stands for, 0 for
    special tokens. `stops` are the ids at which generation ends. `begin` and `end` are the ids that the tokenizer puts
    around a text by itself, such as Llama's beginning of text: prompts, evaluated texts and documents get them too.
    """

    def __init__(
        self, text: str, end_of_text: int | str | None = None, *, name: str = "tokenizer", files: Files | None = None
    ) -> None:
        self.text, self.name, self.files = text, name, dict(files or {})
        self._backend = _read_backend(_byte_level_backend().to_str() if text == BYTES else text, name)
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if not 2 <= self.vocab_size <= MAX_VOCAB_SIZE:
            what = f"the vocabulary size {self.vocab_size:,} is not between 2 and {MAX_VOCAB_SIZE:,}"
            raise DataError(name, what, "use another tokenizer")
        if len(set(ids.values())) < len(ids):
            raise DataError(name, "two tokens share an id", "replace its tokenizer.json")
        self.end_of_text = _find_end_of_text(ids, end_of_text, name)
        self.stops = frozenset((self.end_of_text, *list_stops(self.files)))
        self.chat_template = find_chat_template(self.files)
        self.fingerprint = hashlib.sha256(f"{self.end_of_text}\n{text}".encode()).hexdigest()

        spec: dict[str, Any] = json.loads(self._backend.to_str())
        model: dict[str, Any] = spec["model"]
        unknown: int | None = ids.get(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
        self.unknown = unknown
        self._controls = {token["id"] for token in spec["added_tokens"] if token["special"]} - {unknown}
        self._token_bytes = list_token_bytes(self._backend, spec, ids, self.vocab_size)
        self._byte_level = self._token_bytes is not None
        self._missing = bytes(sorted(set(range(256)) - {b[0] for b in self._token_bytes or [] if len(b) == 1}))
        self._encoded = 0
        lengths = map(len, self._token_bytes) if self._token_bytes else measure_tokens(self._backend, ids, spec)
        self.bytes_per_token: npt.NDArray[np.int64] = np.fromiter(lengths, np.int64, self.vocab_size)
        self.begin, self.end = _find_additions(self._backend, spec)
        self.document_end = self._find_document_end()
        self.stops |= {self.document_end}
        self.closing, self.marks_targets = [self.document_end], False  # of documents
        self.cuts_documents = text == BYTES or _is_cut_safely(spec)

    def _find_document_end(self) -> int:
        """Return the id that ends a document: the end of text, or in a chat model, where that ends a turn, another stop."""
        name, template = self.token(self.end_of_text), self.chat_template or ""
        if name in ENDS_OF_TEXT or not (name in template or "eos_token" in template):
            return self.end_of_text
        known = [i for name in ENDS_OF_TEXT if (i := self.id_of(name)) is not None]
        others = sorted(self.stops - {self.end_of_text})
        return next((i for i in (*known, *others) if i in others), next(iter(known), self.end_of_text))

    def with_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """Return a tokenizer that has these special tokens, too; those that are new get the next ids."""
        backend = _read_backend(self._backend.to_str(), self.name)
        if not backend.add_special_tokens([name for name in names if backend.token_to_id(name) is None]):
            return self
        return Tokenizer(backend.to_str(), self.end_of_text, name=self.name, files=self.files)

    @property
    def backend(self) -> Any:
        """A copy of the `tokenizers` object that reads the text of special tokens as these tokens, and adds none."""
        backend = Backend.from_str(json.dumps({**json.loads(self._backend.to_str()), "post_processor": None}))
        backend.encode_special_tokens = False
        return backend

    def count_lost(self, text: str) -> int:
        """Return how many UTF-8 bytes of `text` cannot be encoded; a byte-level tokenizer need not encode it for that."""
        return self._count_dropped(text.encode()) if self._byte_level else self.encode_counted(text)[1]

    def _count_dropped(self, data: bytes) -> int:
        """Return how many bytes have no token in a byte-level tokenizer; 0 for another kind."""
        return len(data) - len(data.translate(None, self._missing)) if self._byte_level and self._missing else 0

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text`, and the characters (start, end) that each stands for."""
        return self._encode_slowly(text)

    def token(self, i: int) -> str:
        """Return the name of an id in the vocabulary. Raise KeyError if there is none."""
        name: str | None = self._backend.id_to_token(i)
        if name is None:
            raise KeyError(i)
        return name

    def id_of(self, name: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, or None if there is none."""
        found: int | None = self._backend.token_to_id(name)
        return found

    def find_controls(self, names: Iterable[str]) -> frozenset[int]:
        """Return the ids of those `names` that are control tokens, such as `<|im_end|>`."""
        return frozenset(i for name in names if (i := self.id_of(name)) in self._controls and i is not None)

    @property
    def controls(self) -> frozenset[int]:
        """The ids of the special tokens, without that of unknown text."""
        return frozenset(self._controls)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; nothing is added."""
        return self.encode_counted(text)[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of `text` with those that the tokenizer puts around it, as transformers does."""
        return [*self.begin, *self.encode(text), *self.end]

    def encode_counted(self, text: str) -> tuple[list[int], int]:
        """Return the ids of `text`, and how many of its UTF-8 bytes the tokenizer cannot encode."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            what = f"\\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character"
            raise DataError(f"text, character {error.start}", what, "remove it") from None
        lost = self._count_dropped(data)
        self._encoded += len(text)
        is_worth_it = self.text == BYTES or self._encoded > FAST_FROM
        if is_worth_it and self._fast and not lost and (len(text) < 131072 or not LONG_SPACE.search(text)):
            return self._fast(text), 0
        ids, spans = self._encode_slowly(text)
        if self._byte_level:
            return ids, lost
        # A Unigram or word model turns the text "</s>" into a control token: that counts as unrepresented too.
        known = [self.unknown if i in self._controls else i for i in ids]
        return [i for i in known if i is not None], count_unknown(text, known, spans, self.unknown)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that `ids` stand for; special tokens stand for none."""
        if self._token_bytes is None:
            decoded: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
            return decoded.encode()
        return b"".join(self._token_bytes[i] for i in ids if 0 <= i < self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and the files beside it, which `load_tokenizer` and transformers read."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self._backend.to_str() if self.text == BYTES else self.text
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if TOKENIZER_CONFIG in self.files:
            return
        config = {
            # Both transformers 4.57 and 5 know this class; 4.57 does not know the name that version 5 writes.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.token(self.end_of_text),
            "clean_up_tokenization_spaces": False,
            # By default 4.57 also returns token_type_ids, which these models' generate() refuses.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _encode_slowly(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            what = f"the tokenizer cannot encode the text ({_first_line(error)})"
            raise DataError(self.name, what, "use another tokenizer") from None
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def _fast(self) -> Callable[[str], list[int]] | None:
        """tiktoken's encoder for the same BPE, or None if it might give different ids."""
        if self.text == BYTES:
            return _encode_bytes
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        pattern, ranks = _find_pattern(spec), _rank_tokens(spec["model"])
        if pattern is None or not ranks:
            return None
        encode = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
        probe = PROBE.encode().translate(None, self._missing).decode("utf-8", "ignore")
        return encode if encode(probe) == self._encode_slowly(probe)[0] else None


def load_tokenizer(name: str, *, report: Callable[[str], None] = lambda message: None) -> Tokenizer:
    """Return the tokenizer 'bytes', the one in the folder `name`, or the one of that name on the hub (local files first).

    Raise DataError if it is absent or damaged. `report` receives a line before a download is tried.
    """
    if name == BYTES:
        return Tokenizer(BYTES, name=name)
    folder = expand_home(name)
    if not folder.is_dir():
        folder = fetch_from_hub(name, TOKENIZER, report)
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        what, advice = "the folder has no tokenizer.json", "use a folder or a hub repository that has one"
        raise DataError(name, what, advice) from None
    except (OSError, UnicodeDecodeError) as error:
        what = f"the file cannot be read ({_first_line(error)})"
        raise DataError(folder / "tokenizer.json", what, "replace it") from None
    files = read_files(folder)
    return Tokenizer(text, find_end_of_text(files, _read_model_config(folder), str(folder)), name=name, files=files)


def tokenizer_from_text(text: str, end_of_text: int | None = None, files: Files | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint, from its `text`, `end_of_text` and `files`."""
    return Tokenizer(text, end_of_text, name="the checkpoint's tokenizer", files=files)


def restore_tokenizer(state: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer in a checkpoint's content; checkpoints of version 0.1.0 hold no files of it."""
    found = state["tokenizer"]
    return tokenizer_from_text(found["text"], found["end_of_text"], found.get("files"))


def train_tokenizer(chunks: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of up to `vocab_size` ids, fewer if `chunks` support fewer; never under 257.

    It splits digits as SmolLM2's does and has all 256 bytes, so it can represent any text. The same chunks give the
    same tokenizer. The caller limits their size (`Source.sample`); chunks with too many different words are thinned out.
    """
    backend = _byte_level_backend()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts: Iterator[str] = (part for chunk in limit_words(chunks) for part in split_long_runs(chunk))
    backend.train_from_iterator(parts, trainer)
    return Tokenizer(backend.to_str(), END_OF_TEXT, name="the trained tokenizer")


def _byte_level_backend() -> Any:
    """Return a ByteLevel BPE without merges: the ids are the bytes, then end of text."""
    backend = Backend(models.BPE(vocab=map_bytes(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _read_backend(text: str, name: str) -> Any:
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(name, f"tokenizer.json cannot be read ({_first_line(error)})", "replace it") from None
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    return backend


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _find_end_of_text(ids: dict[str, int], wanted: int | str | None, name: str) -> int:
    if isinstance(wanted, int) and wanted in ids.values():
        return wanted
    for token in (wanted, *ENDS_OF_TEXT):
        if isinstance(token, str) and token in ids:
            return ids[token]
    raise DataError(name, "the tokenizer has no end-of-text token", "set it as eos_token in its tokenizer_config.json")


def _read_model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"the file cannot be read ({_first_line(error)})", "replace it") from None
    return config if isinstance(config, dict) else {}


def _find_additions(backend: Any, spec: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    if not spec["post_processor"]:
        return [], []
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _is_cut_safely(spec: dict[str, Any]) -> bool:
    """Return whether the cuts between the chunks of a document (text.py) change no token.

    That holds for ByteLevel tokenizers whose patterns split at every such place. The others look at more of the text:
    whether it begins there, or what comes before a space.
    """
    splitter = spec["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = {step.get("type") for step in steps}
    prefixes = any(step.get("add_prefix_space") for step in steps)
    patterns = {step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"}
    plain = spec["normalizer"] is None or spec["normalizer"]["type"] == "NFC"
    is_known = kinds <= {"ByteLevel", "Digits", "Split"} and "ByteLevel" in kinds and patterns <= CUT_SAFELY
    return plain and not prefixes and is_known


def _encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def _find_pattern(spec: dict[str, Any]) -> str | None:
    """Return the regex that splits text as this tokenizer does, or None if there is none."""
    splitter, model = spec["pre_tokenizer"] or {}, spec["model"]
    steps = splitter.get("pretokenizers", [splitter])
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    special = all(token["special"] for token in spec["added_tokens"])
    if model["type"] != "BPE" or spec["normalizer"] or not special or any(model.get(key) for key in affixes):
        return None
    return {1: PATTERN, 2: DIGITS_PATTERN}[len(steps)] if steps in ([plain], [digits, plain]) else None


def _rank_tokens(model: dict[str, Any]) -> dict[bytes, int] | None:
    """Return tiktoken's ranks, or None unless they are equivalent to the merges: the ids of the merge results ascend,
    and each result encodes to itself on its own."""
    alphabet, ids = map_bytes(), model.get("vocab")
    if model["type"] != "BPE" or not isinstance(ids, dict):
        return None
    results = [left + right for left, right in model["merges"]]
    ordered = all(ids[a] < ids[b] for a, b in pairwise(results))
    if not ordered or not all(set(token) <= alphabet.keys() for token in results):
        return None
    alone = Backend(models.BPE(vocab=ids, merges=[tuple(pair) for pair in model["merges"]]))
    if any(encoding.ids != [ids[token]] for token, encoding in zip(results, alone.encode_batch(results), strict=True)):
        return None
    return {bytes(alphabet[c] for c in token): ids[token] for token in (*(alphabet.keys() & ids.keys()), *results)}
