"""A stream of tokens as windows: window i reads the length + 1 tokens from i x stride on.

Every token but the first of the stream is a target exactly once: where windows overlap, the shared tokens are context
(label -100), and the last window is padded, never dropped.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from smollm2.errors import DataError

NO_TARGET = -100
"""The label of a position that has no target."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]


class Windows:
    """`len()` windows of `length` positions over `tokens`, a new one every `stride` tokens (1 to `length`)."""

    def __init__(self, tokens: Tokens, length: int, stride: int, vocab_size: int) -> None:
        self.name = getattr(tokens, "filename", "the token stream")
        if len(tokens) < 2:
            raise DataError(
                f"{self.name} - {len(tokens)} tokens are too few to predict one from another - use more text"
            )
        assert 1 <= stride <= length
        self.tokens, self.length, self.stride, self.vocab_size = tokens, length, stride, vocab_size
        self.identity = self._identify()

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.length) // self.stride))

    @property
    def tokens_used(self) -> int:
        """Tokens that some window reads; all of them, which the statistics line shows."""
        return min(len(self.tokens), (len(self) - 1) * self.stride + self.length + 1)

    def read(self, i: int) -> tuple[Ints, Ints]:
        """input_ids and labels of window i, each (length,); labels[t] is the token after input_ids[t].

        Raises DataError where an id is outside the vocabulary, or the file is no longer as it was: both are checked
        here, as it is read. (Past the end of a file that was cut, the system would end the process with SIGBUS.)
        """
        if (now := self._identify()) != self.identity and now[:1] == self.identity[:1]:
            what = "it was changed while the run was reading it"
            raise DataError(f"{self.name} - {what} - delete that folder and go on by --resume auto: it is made again")
        first = i * self.stride
        ids = self.tokens[first : first + self.length + 1].astype(np.int64)
        if ids.max() >= self.vocab_size:
            at = first + int(ids.argmax())
            what = f"token {at} is id {ids.max()}, outside the vocabulary of {self.vocab_size}"
            raise DataError(f"{self.name} - {what} - delete that folder: it is made again")
        input_ids, labels = np.zeros(self.length, np.int64), np.full(self.length, NO_TARGET, np.int64)
        input_ids[: len(ids) - 1] = ids[:-1]
        context = self.length - self.stride if i > 0 else 0
        labels[context : len(ids) - 1] = ids[context + 1 :]
        return input_ids, labels

    def _identify(self) -> tuple[int, ...]:
        """The file behind the tokens: inode, size, time of the last change. One that was removed or replaced is still
        there for this process, as it was: an inode of its own."""
        if not isinstance(self.tokens, np.memmap):
            return ()
        try:
            status = Path(self.name).stat()
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns
