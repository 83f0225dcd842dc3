"""Pruning methods: one file each, and this table.

A method is a frozen dataclass of settings. It names the `statistic` it needs of a linear's inputs (a class, or None)
and has one pure function on tensors,

    prune(weight, statistic, pattern, rows=None, pooled=alone) -> Solution(weight, mask, notes)

with `weight` (out_features, in_features) in float32. `rows` lists the output rows of each linear when several that
share their input are stacked in one weight; a method that counts zeros over a whole matrix counts them per linear.
The weight may be one part of a stack that several processes divide; what is counted over all rows goes through `pooled`
(`llmprune.sparsity.parts`).
To add a method: a file here, a row in `METHODS`, a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from llmprune.methods.alps import Alps
from llmprune.methods.magnitude import Magnitude
from llmprune.methods.solution import Solution
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.methods.wanda import Wanda
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.pattern import Pattern
from llmprune.sparsity.statistics import Statistic

__all__ = ["METHODS", "Alps", "Magnitude", "Method", "Solution", "SparseGPT", "Wanda"]


class Method(Protocol):
    """The form of a method; see the text above."""

    statistic: ClassVar[type[Statistic] | None]
    scope: ClassVar[str]

    def prune(
        self,
        weight: Tensor,
        statistic: Statistic | None,
        pattern: Pattern,
        rows: Sequence[int] | None = None,
        *,
        pooled: Pooled = alone,
    ) -> Solution:
        """Prune one weight, or several stacked ones that share their input."""


METHODS: dict[str, type[Method]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "alps": Alps}
