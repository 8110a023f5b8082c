"""The key-value cache: the keys and values of all earlier tokens, so that each is computed only once.

Shapes use the letters of transformer.py. The cache has S columns, the token positions of the left-padded batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMN_STEP = 64
"""Cache columns are allocated and read in multiples of this number. Empty columns cost little, and the number of shapes
stays small: oneDNN compiles its kernels for each new shape, which takes 0.4 s in bf16."""


class Slot(NamedTuple):
    """One layer's part of the key-value cache.

    `keys` and `values` are (B, K, S, D), `column` is the first column to write, and `mask` (B, 1, T, S) is added to the
    scores of the T queries.
    """

    keys: Tensor
    values: Tensor
    column: int
    mask: Tensor


def attend_cached(q: Tensor, k: Tensor, v: Tensor, slot: Slot) -> Tensor:
    """Append k and v to the cache, then return the attention output of q over the whole cache: (B, H, T, D).

    The queries that share a key-value head become rows of one matrix, so grouped heads need no copies of the keys.
    """
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    written = slice(slot.column, slot.column + length)
    slot.keys[:, :, written] = k
    slot.values[:, :, written] = v
    rows = q.reshape(*k.shape[:2], groups * length, q.shape[3])
    mask = slot.mask.repeat(1, 1, groups, 1) if length > 1 else slot.mask
    return F.scaled_dot_product_attention(rows, slot.keys, slot.values, attn_mask=mask).view(q.shape)


class KeyValueCache:
    """Keys and values of a left-padded batch of sequences; `starts` (B,) is the column where each sequence begins.

    `buffer_shape` is (layers, B, K, S, D); the buffers are allocated once. `positions` is the number of positions that
    the model supports.
    """

    def __init__(
        self, starts: Tensor, buffer_shape: tuple[int, int, int, int, int], dtype: torch.dtype, positions: int
    ) -> None:
        self.starts, self.length, self.positions = starts.unsqueeze(1), 0, positions
        # Zeros, because a masked column contributes 0 times its value, which must not be NaN.
        self.keys, self.values = torch.zeros(2, *buffer_shape, dtype=dtype, device=starts.device)
        self.columns = torch.arange(buffer_shape[3], device=starts.device)
        self.mask = torch.full((buffer_shape[1], 1, 1, buffer_shape[3]), -math.inf, dtype=dtype, device=starts.device)

    @property
    def is_full(self) -> bool:
        """Whether no column is left, which happens only after the longest sequence has ended."""
        return self.length == len(self.columns)

    def advance(self, count: int) -> tuple[Tensor, list[Slot]]:
        """Return each sequence's position indices (B, T) for the next `count` tokens, and a `Slot` for each layer.

        Positions in left padding, or past the end of a sequence, are clamped to the model's valid positions.
        """
        first, self.length = self.length, self.length + count
        new = self.columns[first : self.length]
        mask = self._open_column(first) if count == 1 and first else self._open_columns(new)
        seen = min(-(-self.length // COLUMN_STEP) * COLUMN_STEP, len(self.columns))
        keys, values, mask = self.keys[..., :seen, :], self.values[..., :seen, :], mask[..., :seen]
        slots = [Slot(*layer, first, mask) for layer in zip(keys, values, strict=True)]
        return (new - self.starts).clamp(0, self.positions - 1), slots

    def _open_column(self, column: int) -> Tensor:
        self.mask[..., column] = 0
        return self.mask

    def _open_columns(self, new: Tensor) -> Tensor:
        """Return a mask that lets each new column attend to itself and to earlier columns of its sequence.

        Padding attends to itself, because a fully masked row would give NaN.
        """
        inside = (self.columns >= self.starts)[:, None, None]
        seen = (self.columns <= new[:, None]) & inside | (self.columns == new[:, None])
        mask = torch.zeros_like(seen, dtype=self.mask.dtype).masked_fill_(~seen, -math.inf)
        self.mask = mask[:, :, -1:].clone()
        return mask
