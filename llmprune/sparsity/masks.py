"""From scores to masks with exact counts: True = kept, always.

Weights are chosen by rank, never by a threshold, so that a mask keeps neither more nor fewer than its pattern says,
whatever the scores are (all equal, many zeros, infinite). Which of equal scores stays is up to `torch.topk`: the same
one each time on one device, another perhaps on another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.sparsity.pattern import NM, Pattern

__all__ = ["keep_smallest_out", "mask_per_matrix", "mask_per_row", "nm_mask", "row_blocks"]


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest scores of every `m` consecutive inputs.

    Parameters
    ----------
    scores : (out_features, in_features), in_features a multiple of m

    Returns
    -------
    bool (out_features, in_features); every group holds exactly n True.
    """
    groups = scores.unflatten(-1, (-1, m))
    best = groups.topk(n, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)


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
