"""SparseGPT: choose a mask column by column and let later columns make up for it
(Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774).

With H = XᵀX / tokens (damped) and H⁻¹ = UᵀU, U upper triangular, zeroing weight w_j of a row costs w_j² / U_jj² and is
best repaired by w_k −= w_j / U_jj · U_jk in all columns k to its right. The sweep goes left to right; masks are chosen
on weights that earlier columns have already changed: per group of m for N:M, per block of columns over all rows of a
linear otherwise.

Speed: columns are handled one by one only inside a small strip; the rest of their block receives one product per
strip and the rest of the matrix one per block. The weight is held transposed, so that a column is contiguous. On a GPU
one kernel sweeps the whole block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import NumericError, UserError
from llmprune.methods.solution import Solution
from llmprune.sparsity.masks import mask_per_matrix, nm_mask, row_blocks
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import Hessian, Statistic
from llmprune.triton_kernels.sparsegpt_sweep import sparsegpt_sweep

__all__ = ["SparseGPT", "inverse_factor"]

STRIP = 16
"""Columns handled one by one before the rest of the block is updated (unstructured; N:M uses its own m)."""


@dataclass(frozen=True)
class SparseGPT:
    """The optimal-brain-surgeon sweep.

    block_size : columns that share one mask decision (unstructured) and one update of everything to their right; for
        N:M rounded up to whole groups
    dampening_frac : added to H's diagonal, as a fraction of its mean
    """

    block_size: int = 128
    dampening_frac: float = 0.01

    statistic: ClassVar[type[Statistic] | None] = Hessian
    scope: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise UserError(f"block_size is a number of columns, at least 1; got {self.block_size!r}.")
        if not isinstance(self.dampening_frac, float) or not 0 < self.dampening_frac < 1:
            raise UserError(
                f"dampening_frac is a fraction of the Hessian's mean diagonal, between 0 and 1, usually 0.01; "
                f"got {self.dampening_frac!r}."
            )

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
        pooled : no part: of whole linears every one stands alone, and for N:M every row

        Raises
        ------
        NumericError
            if no damping up to the mean diagonal makes the Hessian positive definite.
        """
        assert isinstance(statistic, Hessian)
        factor, notes = inverse_factor(statistic.triangle, self.dampening_frac)
        columns = weight.T.contiguous()
        keep = torch.ones_like(columns, dtype=torch.bool)
        masks = _NMMasks(pattern) if isinstance(pattern, NM) else _BlockMasks(pattern, weight, rows)
        size = self.block_size + -self.block_size % masks.indivisible
        for start in range(0, len(columns), size):
            block = slice(start, start + size)
            errors = _sweep(columns[block], keep[block], factor[block, block], masks)
            columns[start + size :].addmm_(factor[block, start + size :].T, errors, alpha=-1)
        return Solution(columns.T.contiguous(), keep.T.contiguous(), notes)


def inverse_factor(hessian: Tensor, dampening_frac: float) -> tuple[Tensor, tuple[str, ...]]:
    """U upper triangular with (H + λI)⁻¹ = UᵀU, λ = dampening_frac · mean(diag H).

    Factoring H from its last row upwards gives H = RRᵀ with R upper triangular, so U = R⁻¹: one Cholesky and one
    triangular solve, where the textbook way takes three factorisations. Where H is not positive definite, the damping
    is raised to 0.01, 0.1 and at last 1 times the mean diagonal, and a note says so.

    Parameters
    ----------
    hessian : (in_features, in_features) float32; only its upper triangle is read

    Returns
    -------
    U (in_features, in_features), and notes.
    """
    scale, ones = hessian.diagonal().mean().item(), torch.ones_like(hessian.diagonal())
    if scale == 0:
        return ones.diag(), ("all inputs are zero: pruned by magnitude",)
    # These matrices are the largest things in memory: of each only one is held, and no longer than it is needed.
    flipped = hessian.flip(0, 1)
    del hessian
    added = 0.0
    for fraction in (dampening_frac, *(step for step in (0.01, 0.1, 1.0) if step > dampening_frac)):
        flipped.diagonal().add_(fraction * scale - added)
        added = fraction * scale
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed and torch.isfinite(lower.diagonal()).all():
            del flipped
            notes = () if fraction == dampening_frac else (f"damping raised from {dampening_frac:g} to {fraction:g}",)
            root = lower.flip(0, 1)
            del lower
            inverse = ones.diag()
            return torch.linalg.solve_triangular(root, inverse, upper=True, out=inverse), notes
    raise NumericError(
        "the Hessian is not positive definite, even with its mean diagonal added to the diagonal. "
        "Use more calibration text (--num-samples) or --method wanda."
    )


def _sweep(columns: Tensor, keep: Tensor, factor: Tensor, masks: _NMMasks | _BlockMasks) -> Tensor:
    """Prune one block in place: columns (B, O), keep (B, O) bool, factor U (B, B). Returns the errors (B, O)."""
    if columns.is_cuda and find_spec("triton"):  # which there is not for every system that has CUDA
        return masks.swept_at_once(columns, keep, factor)
    errors = torch.empty_like(columns)
    diagonal = factor.diagonal()
    for strip, chosen in masks.strips(columns, diagonal):
        keep[strip] = chosen
        for j in range(strip.start, strip.stop):
            torch.div(columns[j], diagonal[j], out=errors[j])
            errors[j].masked_fill_(keep[j], 0)
            columns[j].masked_fill_(~keep[j], 0)
            if j + 1 < strip.stop:
                columns[j + 1 : strip.stop].addr_(factor[j, j + 1 : strip.stop], errors[j], alpha=-1)
        columns[strip.stop :].addmm_(factor[strip, strip.stop :].T, errors[strip], alpha=-1)
    return errors


class _NMMasks:
    """Masks chosen group by group, when the sweep reaches the group's first column. A strip is a group."""

    def __init__(self, pattern: NM) -> None:
        self.pattern = pattern
        self.indivisible = pattern.m  # columns that may not be split between blocks

    def strips(self, columns: Tensor, diagonal: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(columns), self.pattern.m):
            strip = slice(start, start + self.pattern.m)
            scores = (columns[strip] / diagonal[strip, None]).abs()
            yield strip, nm_mask(scores.T, self.pattern.n, self.pattern.m).T

    def swept_at_once(self, columns: Tensor, keep: Tensor, factor: Tensor) -> Tensor:
        """The sweep of a block by one kernel."""
        return sparsegpt_sweep(columns, keep, factor, pattern=(self.pattern.n, self.pattern.m))


class _BlockMasks:
    """Masks chosen for a whole block of columns at once, over all rows of each linear.

    The zeros of a linear are dealt out to its blocks in proportion to their columns, so that the total is exact.
    """

    indivisible = 1

    def __init__(self, pattern: Unstructured, weight: Tensor, rows: Sequence[int] | None) -> None:
        self.linears = row_blocks(weight, rows)
        self.totals = [pattern.zeros_of(weight[linear].numel()) for linear in self.linears]
        self.in_features, self.done = weight.shape[1], 0

    def strips(self, columns: Tensor, diagonal: Tensor) -> Iterator[tuple[slice, Tensor]]:
        chosen = self._chosen(columns, diagonal)
        for start in range(0, len(columns), STRIP):
            strip = slice(start, min(start + STRIP, len(columns)))
            yield strip, chosen[strip]

    def swept_at_once(self, columns: Tensor, keep: Tensor, factor: Tensor) -> Tensor:
        """The sweep of a block by one kernel."""
        keep.copy_(self._chosen(columns, factor.diagonal()))
        return sparsegpt_sweep(columns, keep, factor)

    def _chosen(self, columns: Tensor, diagonal: Tensor) -> Tensor:
        scores = (columns / diagonal[:, None]).abs()
        end = self.done + len(columns)
        chosen = torch.empty_like(columns, dtype=torch.bool)
        for linear, total in zip(self.linears, self.totals, strict=True):
            zeros = total * end // self.in_features - total * self.done // self.in_features
            chosen[:, linear] = mask_per_matrix(scores[:, linear], zeros)
        self.done = end
        return chosen
