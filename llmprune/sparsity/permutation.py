"""Which inputs should stand together in a group of N:M, so that the pattern keeps as much as it can?

Of every m consecutive inputs N:M keeps n, in each output row for itself. Where important inputs share a group, some
of them are lost although an unimportant one is kept elsewhere. If the inputs may change places (which is free where
the rows of the weight before can change places with them), they are dealt out so that the sum of the kept scores over
all rows and groups is large. RIA (Zhang et al., 2024, https://openreview.net/forum?id=Tr0lPx9woF) deals out inputs by
their summed scores and improves this by linear assignment; Pool & Yu (2021, NeurIPS, "Channel Permutations for N:M
Sparsity") exchange them between pairs of groups. Here it is: deal, then exchange.

Exchanging input a of group A for b of group B changes A by Σ_rows max(t_a, b) − max(a, v), where v is the n-th highest
score of A and t_a the n-th highest of A without a: two comparisons a row. So all m² exchanges of two groups are judged
at once, for as many disjoint pairs of groups as there are, and of each pair the best one is made if it gains.

As scores, w² · diag(H) (Wanda's, squared: what dropping an entry costs) serve every method; the gain is larger for
feed-forward outputs than for those of attention. `scripts/compare_layers --basis permuted` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.sparsity.pattern import NM

__all__ = ["Arrangement", "column_order", "search"]

ROWS = 1024
"""So many rows of scores are looked at, drawn at random: far fewer gain less."""

ROUNDS = 400
"""At most so many times each group is paired with another one."""

REST = 16
"""Rounds between two looks at what they have gained."""

LITTLE = 1e-3
"""Where REST rounds gain less than this fraction of what is dropped, the search ends."""


@dataclass(frozen=True)
class Arrangement:
    """An order of the inputs, and what it brings.

    permutation : (blocks, size) int64; in block b the new unit i is the old unit `permutation[b, i]`
    dropped_before, dropped : share of the scores' sum that the pattern cannot keep, in the old and in this order; 0
        where the inputs do not divide into groups, so that there is no pattern
    """

    permutation: Tensor
    dropped_before: float
    dropped: float


def search(scores: Tensor, pattern: NM, positions: Tensor | None = None, *, seed: int = 0) -> Arrangement:
    """Look for an order of the inputs in which `pattern` keeps more of the scores; the old one if none is found.

    Parameters
    ----------
    scores : (out_features, in_features) float32, ≥ 0: what dropping an entry costs
    positions : (blocks, copies, size) int64, the inputs that move: unit i of block b stands at all of
        `positions[b, :, i]`, and units change places only inside their block. None: every input for itself, one block
    seed : of the random pairs and rows; the same seed gives the same order on one kind of device

    Returns
    -------
    an Arrangement; its permutation is the identity where the units of a block do not divide into groups of m, or
    copies are not made of whole groups.
    """
    if positions is None:
        positions = torch.arange(scores.shape[1])[None, None]
    positions = positions.to(scores.device)
    identity = torch.arange(positions.shape[2], device=scores.device).expand(len(positions), -1)
    before = _dropped_share(scores, pattern) if pattern.fits(scores.shape[1]) else 0.0
    if not _aligned(positions, pattern.m):
        return Arrangement(identity, before, before)
    units = _unit_scores(scores, positions, seed)
    permutation = _search(units, pattern, seed)
    after = _dropped_share(scores[:, column_order(positions, permutation)], pattern)
    return Arrangement(permutation, before, after) if after < before else Arrangement(identity, before, before)


def column_order(positions: Tensor, permutation: Tensor) -> Tensor:
    """Where each input comes from: (in_features,) int64, so that `weight[:, order]` is the weight rearranged.

    Parameters
    ----------
    positions : (blocks, copies, size), as in `search`; together they cover all inputs
    permutation : (blocks, size)
    """
    order = torch.empty(positions.numel(), dtype=torch.int64, device=positions.device)
    order[positions] = positions.gather(2, permutation[:, None].expand_as(positions))
    return order


def _dropped_share(scores: Tensor, pattern: NM) -> float:
    """What share of the sum of `scores` (out_features, in_features) the pattern cannot keep."""
    total = float(scores.sum(dtype=torch.float64))
    return _dropped(scores.unflatten(1, (-1, pattern.m)).unbind(2), pattern.n) / total if total else 0.0


def _dropped(columns: Sequence[Tensor], n: int) -> float:
    """The sum of what is not among the n highest of equally shaped tensors, entry by entry."""
    lowest = _highest([-column for column in columns], len(columns) - n)
    return -sum(float(part.sum(dtype=torch.float64)) for part in lowest)


def _aligned(positions: Tensor, m: int) -> bool:
    """Whether units i·m … i·m + m − 1 of every block are one whole group in each copy."""
    if positions.shape[2] % m:
        return False
    groups = positions.unflatten(2, (-1, m))
    first = groups[..., :1]
    return bool(((first % m == 0) & (groups == first + torch.arange(m, device=groups.device))).all())


def _unit_scores(scores: Tensor, positions: Tensor, seed: int) -> Tensor:
    """(blocks, size, rows): what each unit scores, copies one after the other, at most ROWS rows."""
    copies = positions.shape[1]
    rows = torch.randperm(len(scores) * copies, generator=_generator(seed))[:ROWS].to(scores.device)
    drawn = [scores[rows[rows % copies == copy] // copies][:, positions[:, copy]] for copy in range(copies)]
    units = torch.cat(drawn).permute(1, 2, 0).contiguous()
    return units / units.mean().clamp_min(1e-30)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _search(units: Tensor, pattern: NM, seed: int) -> Tensor:
    """(blocks, size): deal, then exchange while that gains."""
    groups = _deal(units.sum(2), pattern.m)
    state = units.gather(1, groups.flatten(1)[:, :, None].expand_as(units)).unflatten(1, groups.shape[1:])
    blocks, count = groups.shape[:2]
    groups, state = groups.flatten(0, 1), state.flatten(0, 1)
    generator, gained = _generator(seed), 0.0
    for turn in range(1, ROUNDS + 1):
        first, second = (part.to(units.device) for part in _pairs(blocks, count, generator))
        gained += _exchange(state, groups, first, second, pattern.n)
        if turn % REST == 0:
            if gained <= LITTLE * _dropped(state.unbind(1), pattern.n):
                break
            gained = 0.0
    return groups.view(blocks, -1)


def _deal(sums: Tensor, m: int) -> Tensor:
    """(blocks, groups, m): units by falling sum, dealt to the groups to and fro, like teams are chosen."""
    ranked = sums.argsort(1, descending=True).unflatten(1, (m, -1))
    turned = [ranked[:, turn].flip(1) if turn % 2 else ranked[:, turn] for turn in range(m)]
    return torch.stack(turned, 2)


def _pairs(blocks: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Disjoint random pairs of groups; the two of a pair belong to the same block."""
    order = torch.rand(blocks, count, generator=generator).argsort(1) + count * torch.arange(blocks)[:, None]
    half = count // 2
    return order[:, :half].flatten(), order[:, half : 2 * half].flatten()


def _exchange(state: Tensor, groups: Tensor, first: Tensor, second: Tensor, n: int) -> float:
    """Make the best exchange of each pair of groups, where one gains, in place. Returns what they gain together.

    Parameters
    ----------
    state : (groups, m, rows), the scores
    groups : (groups, m), which unit each is
    first, second : (pairs,), indices of groups
    """
    m = state.shape[1]
    left, right = state[first].unbind(1), state[second].unbind(1)
    left_loss, left_least = _without(left, n)
    right_loss, right_least = _without(right, n)
    gains = [
        torch.maximum(left_least[i], right[j]).sum(1)
        + torch.maximum(right_least[j], left[i]).sum(1)
        - (left_loss[i] + right_loss[j])
        for i in range(m)
        for j in range(m)
    ]
    best, which = torch.stack(gains, 1).max(1)
    better = best > 0
    a, b = first[better], second[better]
    i, j = which[better] // m, which[better] % m
    for held in (state, groups):
        held[a, i], held[b, j] = held[b, j], held[a, i]
    return float(best[better].sum())


def _without(columns: Sequence[Tensor], n: int) -> tuple[list[Tensor], list[Tensor]]:
    """For each input of a group: what a group loses by its going, before another one comes, and the score that the
    newcomer has to beat."""
    highest = _highest(columns, n + 1)
    last, next_one = highest[n - 1], highest[n]
    loss = [torch.maximum(column, last).sum(1) for column in columns]
    # One of the two that are added, for a column is the one, the other, or beyond them. (`where` is slow on a CPU.)
    both = last + next_one
    return loss, [both - torch.minimum(torch.maximum(column, next_one), last) for column in columns]


def _highest(columns: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` highest of equally shaped tensors, entry by entry, in falling order."""
    rest, highest = list(columns), []
    for _ in range(count):
        top, others = rest[0], []
        for column in rest[1:]:
            others.append(torch.minimum(top, column))
            top = torch.maximum(top, column)
        highest.append(top)
        rest = others
    return highest
