"""Could any single group of N:M be chosen better, everything else staying as it is?

With all groups but one fixed, the best choice for that one is exact and cheap: m inputs give C(m, n) sets of n to keep,
and each set has a least-squares solution in closed form. A sweep asks this of every group of every output row, one
group of inputs after another and all rows at once, and takes the best answer at once. No step can make the error
larger, so a sweep is at the same time a repair of masks that were chosen by a rule of thumb, and the proof, where it
changes nothing, that a mask cannot be improved one group at a time. Between sweeps conjugate gradients bring the values
of all groups together.

In the scaled, transposed form of `least_squares.py`, the part of the residual that a group sees is b = G_g + H_gg x_g
with G = H (T − X); keeping the set p brings the gain b_pᵀ H_pp⁻¹ b_p. Within a block of inputs G is kept up to date
group by group, behind it once a block, as in SparseGPT's sweep, and so a sweep costs about as much as SparseGPT.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from llmprune.sparsity.least_squares import LeastSquares
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.pattern import NM

__all__ = ["polish"]

BLOCK = 128
"""Inputs, about, between two updates of all that lies behind them."""

BETWEEN = 5
"""Conjugate-gradient steps after every sweep."""


def polish(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    target: Tensor,
    pattern: NM,
    dampening_frac: float = 0.01,
    sweeps: int = 1,
    pooled: Pooled = alone,
) -> tuple[Tensor, Tensor]:
    """Sweeps of group-wise descent, each followed by conjugate gradients on the mask that it found.

    Parameters
    ----------
    weight : (out_features, in_features) float32, a solution in `pattern`, 0 where not kept
    mask : (out_features, in_features) bool, n kept in every group of m
    hessian : (in_features, in_features) float32, symmetric, not damped; overwritten
    target : (out_features, in_features) float32, whose outputs are to be met
    dampening_frac : λ as a fraction of the mean of H's diagonal
    sweeps : at most so many; it ends earlier where a sweep changes no group
    pooled : adds up the changes over all parts of a divided stack

    Returns
    -------
    weight and mask, with an error no larger than before, but for rounding.
    """
    problem = LeastSquares.of(target, hessian, dampening_frac)
    solution, keep = problem.to_scaled(weight), mask.T.contiguous()
    choices = torch.tensor(list(combinations(range(pattern.m), pattern.n)), device=weight.device)
    inverses = _inverses(problem.matrix, pattern.m, choices)
    for _ in range(sweeps):
        before = keep.clone()
        _sweep(problem, solution, keep, choices, inverses)
        solution = problem.solve_on(keep, solution, BETWEEN)
        if not pooled((before != keep).sum()):
            break
    mask = keep.T.contiguous()
    return problem.from_scaled(solution).where(mask, 0), mask


def _inverses(matrix: Tensor, m: int, choices: Tensor) -> Tensor:
    """H_pp⁻¹ of every group and set: (groups, sets, n, n)."""
    own = torch.stack([matrix[start : start + m, start : start + m] for start in range(0, len(matrix), m)])
    inverses: Tensor = torch.linalg.inv(own[:, choices[:, :, None], choices[:, None, :]])
    return inverses


def _sweep(problem: LeastSquares, solution: Tensor, keep: Tensor, choices: Tensor, inverses: Tensor) -> None:
    """Once over all groups; changes `solution` and `keep`, both (in_features, out_features)."""
    matrix, m = problem.matrix, len(problem.matrix) // len(inverses)
    residual = matrix @ (problem.target - solution)
    size = -(-BLOCK // m) * m
    for first in range(0, len(matrix), size):
        block = slice(first, min(first + size, len(matrix)))
        before = solution[block].clone()
        for start in range(block.start, block.stop, m):
            group = slice(start, start + m)
            pull = residual[group].addmm(matrix[group, group], solution[group])
            best, chosen = _best(pull, choices, inverses[start // m])
            residual[block].addmm_(matrix[block, group], solution[group] - best)
            solution[group], keep[group] = best, chosen
        residual[block.stop :].addmm_(matrix[block.stop :, block], before - solution[block])


def _best(pull: Tensor, choices: Tensor, inverses: Tensor) -> tuple[Tensor, Tensor]:
    """For every row the best set of a group and its values: ((m, out_features) values, the same of bool)."""
    candidates = pull[choices]  # (sets, n, out_features)
    values = inverses @ candidates
    best = (candidates * values).sum(1).argmax(0)  # (out_features,)
    places = choices.T[:, best]  # (n, out_features)
    taken = values.gather(0, best.expand(1, values.shape[1], -1))[0]
    chosen = torch.zeros_like(pull, dtype=torch.bool).scatter_(0, places, True)
    return torch.zeros_like(pull).scatter_(0, places, taken), chosen
