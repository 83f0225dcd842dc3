"""The steps that a group of weights goes through, on tensors: target, then mask and weights, then refit.

A method stands alone; a recipe puts steps before and after it. Each step is off unless it is asked for, and works with
every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.methods import Method, Solution
from llmprune.sparsity.group_descent import polish
from llmprune.sparsity.least_squares import refit
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.pattern import NM, Pattern
from llmprune.sparsity.statistics import Hessian, PairedHessian, Statistic
from llmprune.sparsity.target import shifted_target

__all__ = ["MeanInputs", "Recipe", "Solved"]


@dataclass(frozen=True)
class Solved:
    """A pruned weight, and for each linear of the stack the step towards the dense path's target (None: not asked)."""

    solution: Solution
    steps: tuple[float | None, ...]


@dataclass(frozen=True)
class Recipe:
    """How weights are pruned.

    method : chooses the mask, and the weights as its paper says
    dense_targets : aim at the outputs that the dense model would give on its own inputs
    polish : for N:M, sweeps in which every group may choose again; 0: the method's mask stays
    refit : conjugate-gradient steps on the mask; 0: the weights stay
    dampening_frac : of polish and refit, a fraction of the Hessian's mean diagonal
    hold_out : a later step decides on the held-out batches, so nothing is solved on them
    """

    method: Method
    dense_targets: bool = False
    polish: int = 0
    refit: int = 0
    dampening_frac: float = 0.01
    hold_out: bool = False

    @property
    def statistic(self) -> type[Statistic] | None:
        """What the steps need to know of the inputs, all together."""
        if self.dense_targets:
            return PairedHessian
        return Hessian if self.polish or self.refit else self.method.statistic

    def solve(
        self,
        weight: Tensor,
        statistic: Statistic | None,
        pattern: Pattern,
        *,
        rows: Sequence[int],
        held: Statistic | None = None,
        centred: bool = False,
        pooled: Pooled = alone,
    ) -> Solved:
        """Prune a stack of linears.

        Parameters
        ----------
        weight : (out_features, in_features) float32
        statistic : of the kind that `statistic` names, or a plain Hessian where nothing can be compared; used up
        rows : output rows of each linear
        held : of the held-out batches, for choosing the step towards the dense target; used up
        centred : the biases will be refitted, so only the inputs' deviations from their mean matter
        pooled : adds a few numbers up over all parts, where this is one part of a stack that processes divide

        Raises
        ------
        NumericError
            as the method.
        """
        target = weight
        steps: tuple[float | None, ...] = (None,) * len(rows)
        if centred:
            for one in (statistic, held):
                if isinstance(one, PairedHessian):
                    one.centre()
        if isinstance(statistic, PairedHessian) and isinstance(held, PairedHessian) and held.tokens:
            learn_from_all = not self.hold_out
            shift = shifted_target(weight, statistic, held, list(rows), learn_from_all=learn_from_all, pooled=pooled)
            target, steps = shift.target, shift.step
        elif statistic is not None and held is not None and not self.hold_out:
            statistic.merge(held)
        solution = self.method.prune(target, statistic, pattern, rows, pooled=pooled)
        if isinstance(statistic, Hessian):
            solution = self._repaired(solution, statistic, target, pattern, pooled=pooled)
        return Solved(solution, steps)

    def _repaired(
        self, solution: Solution, statistic: Hessian, target: Tensor, pattern: Pattern, *, pooled: Pooled
    ) -> Solution:
        common: dict[str, Any] = {"target": target, "dampening_frac": self.dampening_frac}
        weight, mask = solution.weight, solution.mask
        if self.polish and isinstance(pattern, NM):
            sweeps: dict[str, Any] = {"pattern": pattern, "sweeps": self.polish, "pooled": pooled}
            weight, mask = polish(weight, mask, statistic.matrix, **sweeps, **common)
        if self.refit:
            weight = refit(weight, mask, statistic.matrix, steps=self.refit, **common)
        return replace(solution, weight=weight, mask=mask)


@dataclass(frozen=True)
class MeanInputs:
    """Mean inputs of a linear over the calibration tokens, (in_features,): its own, and the dense model's."""

    own: Tensor
    dense: Tensor

    @classmethod
    def of(cls, known: PairedHessian, held: Statistic | None) -> MeanInputs:
        """From the statistics of all batches."""
        parts = [known, *([held] if isinstance(held, PairedHessian) else [])]
        tokens = max(sum(part.tokens for part in parts), 1e-30)
        own = torch.stack([part.sums for part in parts]).sum(0) / tokens
        return cls(own, own + torch.stack([part.shifts for part in parts]).sum(0) / tokens)

    def bias(self, bias: Tensor, dense: Tensor, pruned: Tensor) -> Tensor:
        """The bias with which a pruned linear's outputs have the dense one's mean, exactly, on these tokens.

        Parameters
        ----------
        bias : (out_features,) of the dense linear
        dense, pruned : weights (out_features, in_features) float32
        """
        return bias + dense @ self.dense - pruned @ self.own
