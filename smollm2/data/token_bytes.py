"""How many bytes of text each id of a tokenizer stands for, and which ones."""

import re
from collections.abc import Iterator
from typing import Any


def map_bytes() -> dict[str, int]:
    """Return the byte that each character of GPT-2's byte alphabet stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


def list_token_bytes(backend: Any, spec: dict[str, Any], ids: dict[str, int], size: int) -> list[bytes] | None:
    """Return the bytes of each id of a byte-level tokenizer, or None for another kind."""
    splitter = spec["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    if spec["model"]["type"] != "BPE" or spec["normalizer"] or "ByteLevel" not in [step.get("type") for step in steps]:
        return None
    alphabet, table = map_bytes(), [b""] * size
    as_latin_1 = str.maketrans({c: chr(byte) for c, byte in alphabet.items()})  # five times as fast as byte by byte
    added = {token["id"]: token for token in spec["added_tokens"]}
    for token, i in ids.items():
        if i in added:
            table[i] = b"" if added[i]["special"] else token.encode()
        elif set(token) <= alphabet.keys():
            table[i] = token.translate(as_latin_1).encode("latin-1")
    return table


def measure_tokens(backend: Any, ids: dict[str, int], spec: dict[str, Any]) -> Iterator[int]:
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


def count_unknown(text: str, ids: list[int | None], spans: list[tuple[int, int]], unknown: int | None) -> int:
    """Return the number of UTF-8 bytes of the characters, except white space, that no known token covers."""
    covered = bytearray(len(text))
    for i, (start, end) in zip(ids, spans, strict=True):
        if i != unknown:
            covered[start:end] = b"\1" * (end - start)
    return len("".join(c for c, seen in zip(text, covered, strict=True) if not seen and not c.isspace()).encode())
