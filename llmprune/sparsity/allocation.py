"""Where the sparsity goes: the same number of zeros, spent where it hurts least.

Two ways, both on plain numbers and tensors:

- OWL (Yin et al., 2023, https://arxiv.org/abs/2310.05175): a layer keeps more the more outliers it has among its
  weights times input norms. `outlier_share` and `owl_sparsities`.
- By error: for every linear it is known, at a few levels, what error so many zeros cause. `cheapest` takes the levels
  whose errors have the least sum under a budget. In the lower convex hull of each linear's levels the slope says what
  one more zero costs; taking the flattest piece that is left, again and again, is the exact optimum of the Lagrangian.

Both keep every linear within `REACH` of the whole sparsity, because errors are measured on few tokens, one linear at a
time, and what is spent far from there is spent on trust. Totals are exact: `whole_zeros` rounds to whole weights.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llmprune.errors import UserError
from llmprune.sparsity.pattern import NM, Pattern, Unstructured, parse_pattern

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Level",
    "bounds",
    "cheapest",
    "interpolated",
    "outlier_share",
    "owl_sparsities",
    "parse_level",
    "shortest_fraction",
    "sparsity_of",
    "whole_zeros",
]

ALLOCATIONS = ("uniform", "owl", "error")

REACH = 0.15
"""How far a linear's sparsity may be from the whole one (algorithms differ: OWL 0.08, searches 0.15 to 0.2)."""

OUTLIER = 5.0
"""An outlier is so many times larger than the mean (OWL's M)."""

OWL_RANGE = 0.08
"""OWL's λ: the densities of its layers lie in a range of twice that."""


@dataclass(frozen=True)
class Allocation:
    """How zeros are dealt out to the linears.

    pattern : what every linear gets if nothing else is said
    kind : "uniform": that; "owl": by outliers; "error": by measured errors
    budget : for N:M and "error", the fraction of zeros over all linears that are allocated; None: the pattern's own
    levels : for N:M and "error", what a linear may get besides `pattern`; None is dense
    """

    pattern: Pattern
    kind: str = "uniform"
    budget: float | None = None
    levels: tuple[Pattern | None, ...] = (None,)

    def __post_init__(self) -> None:
        if self.kind not in ALLOCATIONS:
            raise UserError(f"allocation is one of {', '.join(ALLOCATIONS)}; got {self.kind!r}.")
        chooses = self.kind == "error" and isinstance(self.pattern, NM)
        if self.kind == "owl" and isinstance(self.pattern, NM):
            raise UserError(
                f"allocation 'owl' deals out a fraction of zeros, and {self.pattern} is the same everywhere. "
                "Give a fraction (70%), or allocation 'error' with a budget."
            )
        if self.levels != (None,) and not chooses:
            raise UserError(
                "levels go with allocation 'error' and an N:M sparsity (2:4): elsewhere no weight chooses among them. "
                f"Got allocation {self.kind!r} and sparsity {self.pattern}."
            )
        if self.budget is not None and not chooses:
            raise UserError(
                "a budget goes with allocation 'error' and an N:M sparsity (2:4); with a fraction the sparsity itself "
                f"is the budget. Got allocation {self.kind!r} and sparsity {self.pattern}."
            )
        if chooses:
            self._check_budget()

    @property
    def menu(self) -> tuple[Pattern | None, ...]:
        """What a linear may get, from dense to sparse."""
        return tuple(sorted({self.pattern, *self.levels}, key=sparsity_of))

    @property
    def total(self) -> float:
        """The fraction of zeros over all linears that are allocated."""
        return self.pattern.sparsity if self.budget is None else self.budget

    def _check_budget(self) -> None:
        least, most = sparsity_of(self.menu[0]), sparsity_of(self.menu[-1])
        if any(isinstance(level, Unstructured) for level in self.levels):
            raise UserError("levels are N:M patterns or 'dense' where the sparsity is N:M.")
        if not least < self.total < most:
            listed = ", ".join("dense" if level is None else str(level) for level in self.menu)
            raise UserError(
                f"a budget is a fraction of zeros between those of the levels ({listed}: {least:g} to {most:g}), "
                f"both excluded; got {self.total:g}. Give --budget, or a sparser or denser level."
            )


def parse_level(text: str | float | Pattern | None) -> Pattern | None:
    """Read a pattern as `parse_pattern` does, or "dense", which is None."""
    return None if text is None or text == "dense" else parse_pattern(text)


def sparsity_of(level: Pattern | None) -> float:
    """The fraction of zeros of a pattern, 0 for None (dense)."""
    return level.sparsity if level is not None else 0.0


def bounds(sparsity: float) -> tuple[float, float]:
    """The least and the most sparsity of a linear where `sparsity` is that of all: never dense, never empty."""
    return max(sparsity - REACH, sparsity / 2), min(sparsity + REACH, (1 + sparsity) / 2)


# OWL ------------------------------------------------------------------------------------------------------------------


def outlier_share(scores: Sequence[Tensor], outlier: float = OUTLIER) -> float:
    """The share of entries that are more than `outlier` times as large as the mean, over all linears of a layer.

    Parameters
    ----------
    scores : per linear, |W| · ‖X‖ (out_features, in_features)
    """
    count = sum(part.numel() for part in scores)
    mean = sum(part.double().sum().item() for part in scores) / max(count, 1)
    return sum(int((part > outlier * mean).sum()) for part in scores) / max(count, 1)


def owl_sparsities(shares: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """A sparsity for every layer, the lower the larger its share of outliers, whose mean over all weights is
    `sparsity`.

    Parameters
    ----------
    shares : of outliers, per layer
    sizes : weights, per layer
    """
    lowest, spread = min(shares), max(shares) - min(shares)
    wanted = [-(share - lowest) / spread * 2 * OWL_RANGE if spread else 0.0 for share in shares]
    return _centred(wanted, sizes, sparsity)


def _centred(wanted: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """`wanted`, shifted all alike and cut at the bounds, so that the mean over all weights is `sparsity`."""
    least, most = bounds(sparsity)

    def cut(shift: float) -> list[float]:
        return [min(max(value + shift, least), most) for value in wanted]

    low, high = least - max(wanted), most - min(wanted)  # all at the lower bound, all at the upper one
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(value * size for value, size in zip(cut(middle), sizes, strict=True))
        low, high = (middle, high) if total < sparsity * sum(sizes) else (low, middle)
    return cut((low + high) / 2)


# By error -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """So many zeros in a linear, and the error that they cause."""

    zeros: int
    error: float


def interpolated(sparsities: Sequence[float], errors: Sequence[float], size: int, points: int = 31) -> list[Level]:
    """Levels all along a curve of which a few points were measured; in between, the error grows exponentially.

    Parameters
    ----------
    sparsities : rising
    errors : measured there, ≥ 0; a point whose error is NaN or inf has overflowed, and the curve ends without it
    size : weights of the linear

    Returns
    -------
    rising levels; a single finite point alone, and none at all if no point is finite.
    """
    finite = [(at, math.log(max(error, 1e-30))) for at, error in zip(sparsities, errors) if math.isfinite(error)]
    if len(finite) < 2:
        return [Level(round(at * size), math.exp(log)) for at, log in finite]
    sparsities, logs = [at for at, _ in finite], [log for _, log in finite]
    levels = []
    for point in range(points):
        sparsity = sparsities[0] + (sparsities[-1] - sparsities[0]) * point / (points - 1)
        right = next(i for i, end in enumerate(sparsities) if end >= sparsity - 1e-12)
        right = max(right, 1)
        share = (sparsity - sparsities[right - 1]) / (sparsities[right] - sparsities[right - 1])
        error = math.exp(logs[right - 1] + share * (logs[right] - logs[right - 1]))
        levels.append(Level(round(sparsity * size), error))
    return levels


def cheapest(menus: Sequence[Sequence[Level]], zeros: int, *, divisible: bool) -> list[int]:
    """How many zeros each linear gets, at least `zeros` in all, so that the sum of errors is small.

    Parameters
    ----------
    menus : per linear, its levels
    divisible : what lies between two levels can be had too, and the total is exactly `zeros` (clamped to what the
        menus hold); else every linear gets one of its levels, and the total is the least that the choice reaches
    """
    hulls = [_lower_hull(menu) for menu in menus]
    chosen = [hull[0].zeros for hull in hulls]
    missing = zeros - sum(chosen)
    heap = [(_slope(hull, 0), item, 0) for item, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while heap and missing > 0:
        _, item, at = heapq.heappop(heap)
        step = hulls[item][at + 1].zeros - hulls[item][at].zeros
        step = min(step, missing) if divisible else step
        chosen[item] += step
        missing -= step
        if at + 2 < len(hulls[item]):
            heapq.heappush(heap, (_slope(hulls[item], at + 1), item, at + 1))
    return chosen if divisible else _given_back(menus, chosen, -missing)


def _slope(hull: Sequence[Level], at: int) -> float:
    return (hull[at + 1].error - hull[at].error) / (hull[at + 1].zeros - hull[at].zeros)


def _lower_hull(levels: Sequence[Level]) -> list[Level]:
    """The levels that some price per zero would choose, by rising zeros."""
    hull: list[Level] = []
    for level in sorted(levels, key=lambda level: (level.zeros, level.error)):
        if hull and level.zeros == hull[-1].zeros:
            continue
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) >= _slope([hull[-2], level], 0):
            hull.pop()
        hull.append(level)
    return hull


def _given_back(menus: Sequence[Sequence[Level]], chosen: list[int], over: int) -> list[int]:
    """Whole levels overshoot a budget. Whatever can be taken back without missing it is, largest gain first."""
    while True:
        gains = [
            (now.error - level.error, item, level.zeros)
            for item, menu in enumerate(menus)
            for now in menu
            if now.zeros == chosen[item]
            for level in menu
            if level.error < now.error and now.zeros - level.zeros <= over
        ]
        if not gains:
            return chosen
        _, item, taken = max(gains)
        over -= chosen[item] - taken
        chosen[item] = taken


# Whole weights --------------------------------------------------------------------------------------------------------


def whole_zeros(
    sparsities: Sequence[float],
    sizes: Sequence[int],
    zeros: int,
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    units: Sequence[int] | None = None,
) -> list[int]:
    """Whole numbers of zeros next to the sparsities that are wanted, whose sum is exactly `zeros`.

    What rounding leaves over or short goes to the last linears that have room for it.

    Parameters
    ----------
    sparsities, sizes : per linear, the fraction of zeros and the number of weights
    limits : the least and the most sparsity of a linear
    units : per linear, what its zeros must be a multiple of, such as its rows where zeros are counted by row; the sum
        is then as near to `zeros` as they allow
    """
    units = units or [1] * len(sizes)
    least = [math.ceil(limits[0] * size / unit - 1e-9) * unit for size, unit in zip(sizes, units, strict=True)]
    most = [math.floor(limits[1] * size / unit + 1e-9) * unit for size, unit in zip(sizes, units, strict=True)]
    counts = [round(s * size / unit) * unit for s, size, unit in zip(sparsities, sizes, units, strict=True)]
    counts = [min(max(count, low), high) for count, low, high in zip(counts, least, most, strict=True)]
    rest = zeros - sum(counts)
    for at in reversed(range(len(counts))):
        change = round(rest / units[at]) * units[at]
        change = min(max(change, least[at] - counts[at]), most[at] - counts[at])
        counts[at] += change
        rest -= change
    return counts


def shortest_fraction(zeros: int, count: int) -> float:
    """The decimal fraction with the fewest digits that `Unstructured` turns into `zeros` of `count` weights."""
    for digits in range(1, 18):
        fraction = round(zeros / count, digits)
        if 0 < fraction < 1 and round(fraction * count) == zeros:
            return fraction
    return zeros / count
