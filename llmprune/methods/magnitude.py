"""Magnitude pruning: the smallest weights go (Han et al., 2015, https://arxiv.org/abs/1506.02626).

Needs no data. On language models it is far worse than the others; it is here as the baseline that everyone knows.
Compared inside each output row, which is much better than over the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.methods.solution import Solution
from llmprune.sparsity.masks import mask_per_row
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.pattern import Pattern
from llmprune.sparsity.statistics import Statistic

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude:
    """Scores |W|, compared per output row."""

    statistic: ClassVar[type[Statistic] | None] = None
    scope: ClassVar[str] = "row"

    def prune(
        self,
        weight: Tensor,
        statistic: Statistic | None,
        pattern: Pattern,
        rows: Sequence[int] | None = None,
        *,
        pooled: Pooled = alone,
    ) -> Solution:
        """Zero the smallest of `weight` (out_features, in_features). The other arguments play no part."""
        mask = mask_per_row(weight.abs(), pattern)
        return Solution(weight.where(mask, 0), mask)
