"""Sparse weights of any pattern in the packed form, written out plainly, for the tests of the unstructured kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.triton_kernels.pack_bitmap import BitmapWeight, pack_bitmap
from llmprune.triton_kernels.pack_sell import SellWeight, pack_sell

__all__ = ["PackedRows", "bitmap", "bits_of", "packed_rows", "random_rows", "sell", "uneven_rows"]

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedRows:
    """A weight, dense (rows, in_features) and packed: values (kept,), index uint8 (rows, in_features / 8)."""

    dense: Tensor
    values: Tensor
    index: Tensor

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.dense.shape[1]


def bits_of(tensor: Tensor) -> Tensor:
    """The same bits as whole numbers: -0.0 and 0.0 differ, NaN equals itself."""
    return tensor.view(WHOLE[tensor.element_size()])


def packed_rows(dense: Tensor) -> PackedRows:
    """The packed form of rows; what has zero bits is not kept."""
    kept = bits_of(dense) != 0
    columns = F.pad(kept, (0, -dense.shape[1] % 8)).unflatten(1, (-1, 8))
    index = (columns * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
    return PackedRows(dense=dense, values=dense[kept], index=index)


def random_rows(
    rows: int, in_features: int, *, density: float = 0.5, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> PackedRows:
    """Normal entries, each kept with the same probability."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, in_features, generator=random).to(dtype)
    kept = torch.rand(rows, in_features, generator=random) < density
    return packed_rows(torch.where(kept, dense, torch.zeros((), dtype=dtype)))


def uneven_rows(rows: int, in_features: int, *, dtype: torch.dtype = torch.bfloat16) -> PackedRows:
    """Rows from empty to full, of every density in between, one with a single entry at its end, and a -0.0."""
    random = torch.Generator().manual_seed(2)
    dense = torch.randn(rows, in_features, generator=random).to(dtype)
    kept = torch.rand(rows, in_features, generator=random) < torch.linspace(0, 1, rows)[:, None]
    dense = torch.where(kept, dense, torch.zeros((), dtype=dtype))
    if rows > 2 and in_features:
        dense[1] = 0
        dense[1, -1] = 3
        dense[-1, 0] = -0.0
    return packed_rows(dense)


def sell(case: PackedRows, parts: int | None = 4) -> SellWeight:
    """The case as SELL."""
    return pack_sell(case.values, case.index, case.in_features, parts=parts)


def bitmap(case: PackedRows) -> BitmapWeight:
    """The case with a bitmap."""
    return pack_bitmap(case.values, case.index, case.in_features)
