"""A stack of linears, solved in parts: which rows make up each part, and what a part must know of the others.

Output rows that share their inputs are mostly independent problems, so several processes can take some rows each. Two
things are not: a mask whose zeros are counted out over a whole matrix, which therefore stays in one part; and a few
numbers that steer a solve, such as how many entries of a mask still move. These are added up over all parts by a
function that the caller gives, so that every part steers alike, as if there were no parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

__all__ = ["Part", "Pooled", "alone", "parts_of"]

Pooled = Callable[[Tensor], Tensor]
"""Adds a few numbers up over all parts; every part asks as often as the others, and in the same order."""


def alone(numbers: Tensor) -> Tensor:
    """There is one part, so its numbers are all there are."""
    return numbers


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a stack, and how many of them belong to each of its linears (0 for most)."""

    start: int
    stop: int
    rows: tuple[int, ...]


def parts_of(rows: Sequence[int], count: int, *, whole_linears: bool) -> list[Part]:
    """Divide a stack into `count` parts of nearly equal size; a part may be empty.

    Parameters
    ----------
    rows : output rows of each linear in the stack
    whole_linears : no linear may be cut
    """
    ends = list(accumulate(rows))
    total = ends[-1]
    cuts = [total * part // count for part in range(count + 1)]
    if whole_linears:  # each goes where its middle row would go
        owners = [(2 * end - size) * count // (2 * total) for end, size in zip(ends, rows, strict=True)]
        sizes = [sum(size for size, owner in zip(rows, owners, strict=True) if owner == part) for part in range(count)]
        cuts = [0, *accumulate(sizes)]
    return [Part(start, stop, _overlaps(ends, rows, start, stop)) for start, stop in pairwise(cuts)]


def _overlaps(ends: Sequence[int], rows: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """How many rows of each linear lie between `start` and `stop`."""
    return tuple(max(0, min(end, stop) - max(end - size, start)) for end, size in zip(ends, rows, strict=True))
