"""ALPS: choose the mask and the weights together, by operator splitting, then solve on the mask
(Meng, Behdin, Wang & Mazumder, 2024, https://arxiv.org/abs/2406.07831).

Of the layer's error tr((Y − T) H (Y − T)ᵀ) and the wish that Y be sparse, each alone is easy: the one is a linear
system, the other a choice of the largest entries. ADMM solves them in turn and pulls the two answers Y and Z together
with a penalty ρ, which is raised while the mask still changes, fast when it changes much; when it rests, conjugate
gradients find the best values on it. Columns are scaled by the size of their inputs first, so that the largest entries
are the largest in Wanda's sense.

The splitting keeps Z = P(S) and the scaled dual U = S − P(S), S = Y + U. Both are parts of one matrix S: Z what is
kept of it and U what is dropped. So S and the mask are all the state there is, and Z − U is S with the sign of the
dropped entries turned.

One inverse of H + ρI for each penalty, then one product a step, is what it costs. An eigendecomposition would serve all
penalties, but costs as much as four inverses (1 536 inputs, two CPU cores; not measured on a GPU) and makes it two
products a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import NumericError, UserError
from llmprune.methods.solution import Solution
from llmprune.sparsity.least_squares import LeastSquares
from llmprune.sparsity.masks import mask_per_matrix, nm_mask, row_blocks
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import Hessian, Statistic

__all__ = ["Alps"]

PATIENCE = 3
"""Steps between two looks at how much the mask has changed."""

RAISE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Where more than this share of the kept entries has changed, the penalty is multiplied by that (the paper's)."""

SAMPLE = 1 << 16
"""While the mask still moves, the threshold of a whole matrix is read off so many of its entries."""


@dataclass(frozen=True)
class Alps:
    """ℓ0-constrained layer-wise reconstruction.

    dampening_frac : added to H's diagonal, as a fraction of its mean
    first_penalty : ρ at the start, relative to the unit diagonal of the scaled Hessian
    admm_steps : at most so many steps for the mask; 0: it is that of the largest scaled entries, as Wanda's
    refit_steps : conjugate-gradient steps on the mask, and from two on a shorter one that costs no product

    The paper starts at 0.1, goes on until the mask rests and refits with 10 steps; `Alps(first_penalty=0.1,
    admm_steps=300, refit_steps=10)` is that. The defaults stop earlier, for speed: on layers of SmolLM2-135M most of
    the later steps changed the error on unseen text by little.
    """

    dampening_frac: float = 0.01
    first_penalty: float = 0.4
    admm_steps: int = 12
    refit_steps: int = 5

    statistic: ClassVar[type[Statistic] | None] = Hessian
    scope: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        for name, least in (("admm_steps", 0), ("refit_steps", 1)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise UserError(f"{name} is a number of steps, at least {least}; got {value!r}.")
        if not self.first_penalty > 0:
            raise UserError(f"first_penalty is a positive number, usually 0.1 to 0.5; got {self.first_penalty!r}.")

    def prune(
        self,
        weight: Tensor,
        statistic: Statistic | None,
        pattern: Pattern,
        rows: Sequence[int] | None = None,
        *,
        pooled: Pooled = alone,
    ) -> Solution:
        """Prune and repair.

        Parameters
        ----------
        weight : (out_features, in_features) float32; several linears with the same input may be stacked
        statistic : Hessian of the inputs
        rows : output rows of each stacked linear: zeros are counted per linear, never over the stack
        pooled : adds up how much of the mask moves, which steers the penalty, over all parts of a divided stack

        Raises
        ------
        NumericError
            if the damped Hessian is not positive definite.
        """
        assert isinstance(statistic, Hessian)
        problem = LeastSquares.of(weight, statistic.matrix, self.dampening_frac)
        choice = _Choice(pattern, row_blocks(weight, rows))
        keep = choice.exact(problem.target)
        dropped = (problem.target != 0).logical_and_(~keep).count_nonzero()
        if not pooled(dropped) or not pooled(keep.count_nonzero()):  # nothing to repair, or nothing left
            mask = keep.T.contiguous()
            return Solution(weight.where(mask, 0), mask)
        state = problem.target
        if self.admm_steps:
            state = _admm(problem, choice, keep, penalty=self.first_penalty, steps=self.admm_steps, pooled=pooled)
            keep = choice.exact(state)
        solved = problem.solve_on(keep, state * keep, self.refit_steps, beyond=True)
        mask = keep.T.contiguous()
        return Solution(problem.from_scaled(solved).where(mask, 0), mask)


def _admm(
    problem: LeastSquares, choice: _Choice, keep: Tensor, *, penalty: float, steps: int, pooled: Pooled
) -> Tensor:
    """The state S (in_features, out_features) when the mask rests, or after so many steps."""
    state = problem.target * keep
    inverse = _inverse(problem.matrix, penalty, out=torch.empty_like(problem.matrix))
    product = problem.matrix @ problem.target  # B
    before, kept = keep, pooled(keep.count_nonzero()).item()
    chosen, pulled = torch.empty_like(state), torch.empty_like(state)  # once: new memory costs as much as a step
    for step in range(1, steps + 1):
        torch.mul(state, chosen.copy_(keep), out=chosen)  # Z
        torch.add(product, state, alpha=-penalty, out=pulled).add_(chosen, alpha=2 * penalty)  # B + ρ(Z − U)
        state.sub_(chosen).addmm_(inverse, pulled)  # U + Y
        keep = choice.quick(state)
        if step % PATIENCE or step == steps:
            continue
        changed = pooled((keep != before).count_nonzero()).item() / 2 / kept
        if changed == 0:
            break
        factor = next(factor for share, factor in RAISE if changed > share)
        penalty, before = penalty * factor, keep
        state = torch.where(keep, state, state / factor)  # the dual itself stays; U is the dual divided by ρ
        _inverse(problem.matrix, penalty, out=inverse)
    return state


def _inverse(matrix: Tensor, penalty: float, *, out: Tensor) -> Tensor:
    """(H + ρI)⁻¹, written to `out`."""
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    lower, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        raise NumericError("the Hessian holds NaN or inf.")
    del shifted  # in a wide layer each of these takes gigabytes
    return torch.cholesky_inverse(lower, out=out)


class _Choice:
    """The largest entries that a pattern lets stay, of transposed stacks (in_features, sum of rows)."""

    def __init__(self, pattern: Pattern, linears: Sequence[slice]) -> None:
        self.pattern, self.linears = pattern, linears

    def exact(self, values: Tensor) -> Tensor:
        """The mask, with the exact count of each linear."""
        if isinstance(self.pattern, NM):
            return nm_mask(values.abs(), self.pattern.n, self.pattern.m, dim=0)
        return self._each_linear(values.abs(), mask_per_matrix)

    def quick(self, values: Tensor) -> Tensor:
        """The same for N:M; for a whole matrix the count is only nearly right."""
        if isinstance(self.pattern, NM):
            return self.exact(values)
        return self._each_linear(values.abs(), _over_sampled_threshold)

    def _each_linear(self, scores: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        assert isinstance(self.pattern, Unstructured)
        keep = torch.empty_like(scores, dtype=torch.bool)
        for linear in self.linears:
            part = scores[:, linear]
            if part.numel():  # a linear may be another process's
                keep[:, linear] = choose(part, self.pattern.zeros_of(part.numel()))
        return keep


def _over_sampled_threshold(scores: Tensor, zeros: int) -> Tensor:
    every = max(1, scores.numel() // SAMPLE)
    while math.gcd(every, scores.shape[1]) > 1:  # or some columns would never be looked at
        every += 1
    sample = scores.flatten()[::every]
    rank = min(max(1, round(zeros / every)), sample.numel())
    return scores > sample.kthvalue(rank).values
