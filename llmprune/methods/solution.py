"""What every method returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Solution"]


@dataclass(frozen=True)
class Solution:
    """A pruned weight.

    weight : (out_features, in_features), exactly 0 where not kept
    mask : bool, the same shape, True = kept
    notes : what went other than usual, for the report
    """

    weight: Tensor
    mask: Tensor
    notes: tuple[str, ...] = ()
