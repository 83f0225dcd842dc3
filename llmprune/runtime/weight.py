"""A packed weight as the paths see it: its tensors, and what they derive from these once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from llmprune.sparsity.pack import ANY, Packed, row_starts, unpack

__all__ = ["UNPACKED", "Path", "SparseWeight"]

UNPACKED = "llmprune_unpacked"
"""Attribute of a loaded model: how many packed weights became dense while it was loaded."""

T = TypeVar("T")

Path = Callable[[Tensor], Tensor]
"""A way to multiply, made for one weight: x (..., in_features), of its dtype and not empty, → (..., out_features)."""


class SparseWeight:
    """A packed weight (out_features, in_features) with its bias (out_features,) or None."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        self.packed, self.bias = packed, None if bias is None else bias.data
        self.values, self.index, self.pattern = packed.values, packed.index, packed.pattern
        self.in_features, self.out_features = packed.in_features, packed.rows
        self._made: dict[Callable[[SparseWeight], object], object] = {}

    def once(self, make: Callable[[SparseWeight], T]) -> T:
        """What `make` gives for this weight: made by the first path that asks, shared by all others."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[return-value]

    def forget(self) -> None:
        """Give back the memory of everything that was derived."""
        self._made.clear()
        for name in ("dense", "starts"):
            self.__dict__.pop(name, None)

    @property
    def density(self) -> float:
        """Stored values, as a fraction of all entries."""
        return self.values.numel() / max(1, self.in_features * self.out_features)

    @cached_property
    def starts(self) -> Tensor | None:
        """Where each row's values begin, (out_features + 1,) int64; None for N:M, where rows are of one length."""
        return row_starts(self.index) if self.pattern == ANY else None

    @cached_property
    def dense(self) -> Tensor:
        """(out_features, in_features), held from the first use on, besides the packed form."""
        return unpack(self.packed)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values and of all else."""
        return self.values.device
