"""Text to ids and back: a byte-level BPE trained on the corpus, raw bytes, or any `tokenizer.json`.

`encode` adds no tokens and treats the text of a special token as plain text. tiktoken encodes if it is provably exact:
ByteLevel with or without Digits, no normalizer, and every merge result alone encodes to itself. By induction over token
length, both algorithms then make the same merges in the same order. A text on which tiktoken would panic (a byte
without a token, a very long run of spaces; the panic is a BaseException) is detected beforehand and encoded by
`tokenizers`. Text that a tokenizer cannot encode becomes its unknown id, or is dropped without one, and is counted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from smollm2.data.hub import TOKENIZER, fetch_from_hub
from smollm2.data.sampling import limit_words, split_long_runs
from smollm2.data.text import END_OF_TEXT, expand_home
from smollm2.errors import DataError

BYTES = "bytes"
ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Names of the end-of-text token, in order of preference, for a tokenizer whose own config gives none."""

MAX_VOCAB_SIZE = 2**21
LONG_SPACE = re.compile(r"\s{131072}")
"""tiktoken's regex engine overflows its stack between 262,144 and 1,048,576 spaces in a row (0.14, measured)."""

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
PROBE = "It's 3.14,  we'll\r\n\r\n\tsee\u3000\u0085x ²½ éa\u0301 漢字 \U0001f600  9 <|endoftext|> ___\n \n  end  "


def map_bytes() -> dict[str, int]:
    """Return the byte that each character of GPT-2's byte alphabet stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


class Tokenizer:
    """A tokenizer. Build it with `load_tokenizer`, `tokenizer_from_text` or `train_tokenizer`.

    `text` is the content of tokenizer.json, or 'bytes'; a checkpoint needs only that and `end_of_text`.
    `bytes_per_token` (V,) is the number of UTF-8 bytes that each id stands for, 0 for special tokens.
    """

    def __init__(self, text: str, end_of_text: int | str | None = None, *, name: str = "tokenizer") -> None:
        self.text, self.name = text, name
        self._backend = _read_backend(_byte_level_backend().to_str() if text == BYTES else text, name)
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if not 2 <= self.vocab_size <= MAX_VOCAB_SIZE:
            what = f"the vocabulary size {self.vocab_size:,} is not between 2 and {MAX_VOCAB_SIZE:,}"
            raise DataError(name, what, "use another tokenizer")
        if len(set(ids.values())) < len(ids):
            raise DataError(name, "two tokens share an id", "replace its tokenizer.json")
        self.end_of_text = _find_end_of_text(ids, end_of_text, name)
        self.fingerprint = hashlib.sha256(f"{self.end_of_text}\n{text}".encode()).hexdigest()

        spec: dict[str, Any] = json.loads(self._backend.to_str())
        model: dict[str, Any] = spec["model"]
        unknown: int | None = ids.get(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
        self.unknown = unknown
        self._controls = {token["id"] for token in spec["added_tokens"] if token["special"]} - {unknown}
        self._token_bytes = _list_token_bytes(self._backend, spec, ids, self.vocab_size)
        self._byte_level = self._token_bytes is not None
        self._missing = bytes(sorted(set(range(256)) - {b[0] for b in self._token_bytes or [] if len(b) == 1}))
        self._fast = _encode_bytes if text == BYTES else self._find_fast_encoder(spec)
        lengths = map(len, self._token_bytes) if self._token_bytes else _measure_tokens(self._backend, ids, spec)
        self.bytes_per_token: npt.NDArray[np.int64] = np.fromiter(lengths, np.int64, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; nothing is added."""
        return self.encode_counted(text)[0]

    def encode_counted(self, text: str) -> tuple[list[int], int]:
        """Return the ids of `text`, and how many of its UTF-8 bytes the tokenizer cannot encode."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            what = f"\\u{ord(text[error.start]):04x} is half of a surrogate pair, not a character"
            raise DataError(f"text, character {error.start}", what, "remove it") from None
        lost = len(data) - len(data.translate(None, self._missing)) if self._byte_level and self._missing else 0
        if self._fast and not lost and (len(text) < 131072 or not LONG_SPACE.search(text)):
            return self._fast(text), 0
        ids, spans = self._encode_slowly(text)
        if self._byte_level:
            return ids, lost
        # A Unigram or word model turns the text "</s>" into a control token: that counts as unrepresented too.
        known = [self.unknown if i in self._controls else i for i in ids]
        return [i for i in known if i is not None], _count_unknown(text, known, spans, self.unknown)

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
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers read."""
        end: str = self._backend.id_to_token(self.end_of_text)
        config = {
            # Both transformers 4.57 and 5 know this class; 4.57 does not know the name that version 5 writes.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
            # By default 4.57 also returns token_type_ids, which these models' generate() refuses.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = self._backend.to_str() if self.text == BYTES else self.text
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _encode_slowly(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            what = f"the tokenizer cannot encode the text ({_first_line(error)})"
            raise DataError(self.name, what, "use another tokenizer") from None
        return encoding.ids, encoding.offsets

    def _find_fast_encoder(self, spec: dict[str, Any]) -> Callable[[str], list[int]] | None:
        """Return tiktoken's encoder for the same BPE, or None if it might give different ids."""
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
    return Tokenizer(text, _read_end_of_text(folder), name=name)


def tokenizer_from_text(text: str, end_of_text: int | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint, from its `text` and `end_of_text`."""
    return Tokenizer(text, end_of_text, name="the checkpoint's tokenizer")


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


def _read_end_of_text(folder: Path) -> int | str | None:
    """Return the end of text that the folder's own configs name, if any."""
    for file, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        try:
            config: Any = json.loads((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(folder / file, f"the file cannot be read ({_first_line(error)})", "replace it") from None
        value = config.get(key) if isinstance(config, dict) else None
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int | str) and not isinstance(value, bool):
            return value
    return None


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


def _list_token_bytes(backend: Any, spec: dict[str, Any], ids: dict[str, int], size: int) -> list[bytes] | None:
    """Return the bytes of each id of a byte-level tokenizer, or None for another kind."""
    splitter = spec["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    if spec["model"]["type"] != "BPE" or spec["normalizer"] or "ByteLevel" not in [step.get("type") for step in steps]:
        return None
    alphabet, table = map_bytes(), [b""] * size
    added = {token["id"]: token for token in spec["added_tokens"]}
    for token, i in ids.items():
        if i in added:
            table[i] = b"" if added[i]["special"] else token.encode()
        elif set(token) <= alphabet.keys():
            table[i] = bytes(alphabet[c] for c in token)
    return table


def _measure_tokens(backend: Any, ids: dict[str, int], spec: dict[str, Any]) -> Iterator[int]:
    """Yield each id's number of UTF-8 bytes in a tokenizer that is not byte-level: what a second copy adds to text."""
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    names = {i: token for token, i in ids.items()}
    size = max(names) + 1
    once = backend.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    twice = backend.decode_batch([[i, i] for i in range(size)], skip_special_tokens=False)
    for i, (one, two) in enumerate(zip(once, twice, strict=True)):
        if i in special or i not in names:
            yield 0
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", names[i]):  # byte fallback
            yield 1
        else:
            yield max(0, len(two.encode()) - len(one.encode()))


def _count_unknown(text: str, ids: list[int | None], spans: list[tuple[int, int]], unknown: int | None) -> int:
    """Return the number of UTF-8 bytes of the characters, except white space, that no known token covers."""
    covered = bytearray(len(text))
    for i, (start, end) in zip(ids, spans, strict=True):
        if i != unknown:
            covered[start:end] = b"\1" * (end - start)
    return len("".join(c for c, seen in zip(text, covered, strict=True) if not seen and not c.isspace()).encode())
