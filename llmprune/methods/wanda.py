"""Wanda: weights times the norm of what they are multiplied with (Sun et al., 2023, https://arxiv.org/abs/2306.11695).

A weight matters by |W_ij| · ‖X_j‖₂; compared inside each output row. Kept weights stay as they are. Among features that
are always zero, or where no token came at all, magnitude decides.
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
from llmprune.sparsity.statistics import FeatureNorm, Hessian, Statistic

__all__ = ["Wanda"]

LEAST_NORM = 2.0**-100
"""Stands for a norm of zero. The root of a float32 is 0 or at least 2**-75, so it is below every other norm; and a
power of two leaves the order of weights as it is."""


@dataclass(frozen=True)
class Wanda:
    """Scores |W| · ‖X‖, compared per output row."""

    statistic: ClassVar[type[Statistic] | None] = FeatureNorm
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
        """Zero the weights that matter least.

        Parameters
        ----------
        weight : (out_features, in_features) float32
        statistic : FeatureNorm of the inputs, or a Hessian, which holds their norms too
        rows, pooled : no part: every row stands alone, so stacked or divided linears need no care
        """
        assert isinstance(statistic, FeatureNorm | Hessian)
        mask = mask_per_row(weight.abs() * statistic.norms.clamp_min(LEAST_NORM), pattern)
        return Solution(weight.where(mask, 0), mask)
