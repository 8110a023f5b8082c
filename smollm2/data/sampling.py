"""The part of a long text that a tokenizer is trained on: spread evenly over it, with a bounded number of different words.

The trainer's memory and time grow with its table of different words. Text without spaces is the extreme case: nearly
every clause of Chinese, and every part of a DNA sequence, is a word of its own.
"""

import re
from collections.abc import Iterable, Iterator

WORD_BYTES = 2_500_000
"""The limit for the sum of the lengths of different words, in bytes.

The trainer takes 80 to 170 bytes of memory for each. Measured on 2026-11-26 with 32,000 entries, 20 MB of Chinese took
333 MB and 12 s instead of 1,991 MB and 41 s. 49 MB of Python source have 0.9 MB of different words: nothing is left out.
"""

LONG_RUN = re.compile(r"(\S{256}|\s{256})")
"""Training splits longer words: the time of a merge grows with the length of the word."""

WORD = re.compile(r" ?[^\W\d_]{1,256}| ?[^\w\s]{1,256}|\s{1,256}")
"""About what the trainer will take for a word. Digits, each a word of its own, and underscores are not counted."""


def spread_evenly(texts: Iterable[bytes], size: int, limit: int) -> Iterator[bytes]:
    """Yield about `limit` of the `size` bytes of `texts`, spread evenly over them; all of them if they are fewer.

    At every point, what was taken exceeds its share of what was seen by one text at most.
    """
    seen = taken = 0
    for text in texts:
        if taken * size <= seen * limit:
            yield text
            taken += len(text)
        seen += len(text)


def limit_words(texts: Iterable[str], limit: int = WORD_BYTES) -> Iterator[str]:
    """Yield the texts, or, if their different words are longer than `limit` bytes in all, evenly spread ones.

    One text is yielded in any case. They are held in memory as UTF-8.
    """
    kept = [text.encode() for text in texts]
    while len(kept) > 1 and (fitting := count_fitting(kept, limit)) < (size := sum(map(len, kept))):
        # The quarter ensures that each pass leaves fewer texts, and that few passes are needed.
        kept = list(spread_evenly(kept, size, min(fitting, size * 3 // 4)))
    return (text.decode() for text in kept)


def count_fitting(texts: Iterable[bytes], limit: int) -> int:
    """Return how many bytes of `texts`, from the first one, have different words of at most `limit` bytes in all."""
    words: set[str] = set()
    length = fitting = 0
    for text in texts:
        new = set(WORD.findall(text.decode())) - words
        length += sum(len(word.encode()) for word in new)
        if length > limit:
            break
        words |= new
        fitting += len(text)
    return fitting


def split_long_runs(text: str) -> Iterator[str]:
    """Yield the parts of `text`, so that no word in them is longer than 256 characters and a space."""
    return (part for part in LONG_RUN.split(text) if part)
