"""A sparse weight of any pattern as masks, offsets and values: what the bitmap kernels read.

The packed form of a weight W (out_features, in_features) is `values`, its kept entries row by row in the order of their
columns, and `index`, one bit for each column of each row. To find the value of a column a kernel must know how many
kept entries come before it. Counting them from the start of the row would take as long as reading the row, so each
word of 32 columns gets the count at its first column; the rest is the number of bits below the column in that word.

That costs half a bit for each weight: with the mask bit and bfloat16 values 16 · density + 1.5 bits in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "MOST_INPUTS",
    "MOST_VALUES",
    "BitmapWeight",
    "check_packed",
    "kept_columns",
    "pack_bitmap",
    "popcount",
    "unpack_bitmap",
]

WORD = 32
"""Columns in one word of a mask."""

WORDS_A_TILE = 4
"""Rows of masks are filled up to a multiple of so many words: the kernels take 128 columns at once."""

MOST_INPUTS = 1 << 16
"""Counts within a row are stored in 16 bits."""

MOST_VALUES = 1 << 31
"""Places in the stream of values are 32-bit numbers in the kernels."""


PADDING = 16
"""Kernels read up to ten values beyond the last; with these there are more, and an even number of them."""


@dataclass(frozen=True)
class BitmapWeight:
    """A sparse weight for `matmul_bitmap` and `decompress_bitmap`.

    values : (kept,) and 16 or 17 zeros after them, the weight's dtype
    masks : int32 (out_features, words); bit b of word w says that column 32 w + b is kept; 0 beyond in_features
    offsets : int16, to be read as unsigned, (out_features, words): kept columns of the row before word w
    row_starts : int32 (out_features,): where the values of each row begin
    in_features : columns of the weight
    """

    values: Tensor
    masks: Tensor
    offsets: Tensor
    row_starts: Tensor
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.masks.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def tensors(self) -> list[Tensor]:
        """What an operation of torch takes in its place; `of` turns it back."""
        return [self.values, self.masks, self.offsets, self.row_starts]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], in_features: int) -> BitmapWeight:
        """The weight with these `tensors`."""
        values, masks, offsets, row_starts = tensors
        return cls(values, masks, offsets, row_starts, in_features)

    @property
    def nbytes(self) -> int:
        """Bytes that a product must read of it."""
        return sum(tensor.nbytes for tensor in self.tensors)


def pack_bitmap(values: Tensor, index: Tensor, in_features: int) -> BitmapWeight:
    """Convert the packed form, once when a weight is loaded.

    Parameters
    ----------
    values : kept entries row by row, of any shape: (kept,), or (out_features, in_features · n / m) for n:m
    index : uint8 (out_features, in_features / 8 rounded up); bit b of byte k is column 8 k + b

    Raises
    ------
    ValueError : if index and values do not fit each other, or are too large for the kernels' numbers
    """
    check_packed(values, index, in_features)
    words = max(1, -(-in_features // (WORD * WORDS_A_TILE))) * WORDS_A_TILE
    masks = F.pad(index, (0, words * 4 - index.shape[1])).view(torch.int32)
    counts = popcount(masks)
    totals = counts.sum(1)
    if int(totals.sum()) != values.numel():
        raise ValueError(
            f"index must have one bit for each value: got {int(totals.sum())} bits, {values.numel()} values"
        )
    return BitmapWeight(
        values=F.pad(values.reshape(-1), (0, PADDING + values.numel() % 2)),
        masks=masks,
        offsets=(counts.cumsum(1) - counts).to(torch.int16),
        row_starts=(totals.cumsum(0) - totals).to(torch.int32),
        in_features=in_features,
    )


def check_packed(values: Tensor, index: Tensor, in_features: int) -> None:
    """Refuse what cannot be the packed form of one weight, or is too large for 16-bit columns and 32-bit places."""
    width = -(-in_features // 8)
    if index.dtype != torch.uint8 or index.dim() != 2 or index.shape[1] != width:
        raise ValueError(
            f"index must be uint8 (out_features, {width}) for {in_features} inputs, "
            f"got {index.dtype} {tuple(index.shape)}"
        )
    if in_features > MOST_INPUTS:
        raise ValueError(f"in_features must be at most {MOST_INPUTS}, got {in_features}")
    if values.numel() >= MOST_VALUES:
        raise ValueError(f"a weight must keep fewer than {MOST_VALUES} values, got {values.numel()}")


def unpack_bitmap(weight: BitmapWeight) -> Tensor:
    """The dense weight (out_features, in_features), bit for bit."""
    kept = kept_columns(weight.masks.view(torch.uint8), weight.in_features)
    dense = torch.zeros(kept.shape, dtype=weight.values.dtype, device=kept.device)
    return dense.masked_scatter_(kept, weight.values)


def kept_columns(index: Tensor, in_features: int) -> Tensor:
    """Index bits, uint8 (rows, bytes), as bool (rows, in_features)."""
    bits = index.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=index.device)
    return (bits & 1).bool().flatten(1)[:, :in_features]


def popcount(words: Tensor) -> Tensor:
    """How many bits are set in each of a tensor of int32 words: sums in pairs, fours, bytes, then all four bytes."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
