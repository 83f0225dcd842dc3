"""From scores to masks with exact counts: True = kept, always.

Weights are chosen by rank, never by a threshold, so that a mask keeps neither more nor fewer than its pattern says,
whatever the scores are (all equal, many zeros, infinite). Which of equal scores stays is the same each time on one
device, another perhaps on another (`torch.topk` decides).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from llmprune.sparsity.pattern import NM, Pattern

__all__ = ["keep_smallest_out", "mask_per_matrix", "mask_per_row", "nm_mask", "row_blocks"]

SMALL_GROUP = 8
"""Up to so many inputs a group's best are found by comparing them in pairs, whole columns at once. For 2:4 on a CPU
that takes a fifth of the time of a `topk` in every group."""


def nm_mask(scores: Tensor, n: int, m: int, *, dim: int = 1) -> Tensor:
    """Keep the `n` highest scores of every `m` consecutive inputs.

    Parameters
    ----------
    scores : (out_features, in_features), in_features a multiple of m; no NaN
    dim : the axis over the inputs; 0 for a matrix that is held transposed

    Returns
    -------
    bool, of the same shape; every group holds exactly n True.
    """
    groups = scores.unflatten(dim, (-1, m))
    if m <= SMALL_GROUP:
        return torch.stack(_highest(groups.unbind(dim + 1), n), dim + 1).flatten(dim, dim + 1)
    best = groups.topk(n, dim=dim + 1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(dim + 1, best, True).flatten(dim, dim + 1)


def _highest(columns: Sequence[Tensor], n: int) -> list[Tensor]:
    """For each of m equally shaped tensors, where it is among the n highest: by comparing every pair.

    Of two equal ones the first wins, so that the wins of a group are all different: 0 to m − 1.
    """
    wins = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for i, j in combinations(range(len(columns)), 2):
        first = columns[i] >= columns[j]
        wins[i] += first
        wins[j] += first.logical_not_()
    return [count >= len(columns) - n for count in wins]


def keep_smallest_out(scores: Tensor, zeros: int) -> Tensor:
    """A mask over the last axis of `scores` that is False at the `zeros` smallest, exactly.

    Parameters
    ----------
    scores : (..., count)
    zeros : how many to drop of each last axis, 0 ≤ zeros ≤ count
    """
    lowest = scores.topk(zeros, dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, lowest, False)


def mask_per_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """Spend the pattern inside every output row: groups of m, or the same count of zeros in each row.

    Parameters
    ----------
    scores : (out_features, in_features)
    """
    if isinstance(pattern, NM):
        return nm_mask(scores, pattern.n, pattern.m)
    return keep_smallest_out(scores, pattern.zeros_of(scores.shape[-1]))


def mask_per_matrix(scores: Tensor, zeros: int) -> Tensor:
    """Drop the `zeros` smallest scores of the whole matrix (out_features, in_features)."""
    return keep_smallest_out(scores.flatten(), zeros).view_as(scores)


def row_blocks(weight: Tensor, rows: Sequence[int] | None) -> list[slice]:
    """The output rows of each linear in a stack of linears that share their input.

    Parameters
    ----------
    weight : (sum of rows, in_features)
    rows : output rows of each linear in the stack; None: the weight is a single linear
    """
    slices, start = [], 0
    for count in rows or [weight.shape[0]]:
        slices.append(slice(start, start + count))
        start += count
    assert start == weight.shape[0], (start, tuple(weight.shape))
    return slices
