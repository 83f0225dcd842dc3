"""How many warps share the rows of a SELL weight: the settings worth trying on a GPU, and what to use untimed.

`parts` is decided when a weight is packed, `warps` when it is multiplied. Nothing here needs a GPU or triton.
"""

from __future__ import annotations

from itertools import product

__all__ = ["candidates_sell", "default_parts", "default_warps"]

FILLING_PROGRAMS = 100
"""With so many programs most of a large GPU's multiprocessors have work (an H100 has 132)."""

FILLING_WARPS = 3072
"""Reads of so many warps hide the memory's latency: 23 on each multiprocessor of an H100. An estimate, to be tuned."""

FEWEST_WARPS, MOST_WARPS = 4, 32
"""Of one program."""


def default_parts(slices: int, blocks: int) -> int:
    """How many warps should share a slice: a power of two that fills the GPU, each with two blocks or more.

    slices, blocks : of the weight, and of its longest slice
    """
    parts = FEWEST_WARPS
    while slices * parts < FILLING_WARPS and parts * 4 <= blocks:
        parts *= 2
    return parts


def default_warps(slices: int, parts: int) -> int:
    """How many of a slice's parts one program takes: all, unless too few programs come of it or it were too large."""
    warps = min(parts, MOST_WARPS)
    while slices * (parts // warps) < FILLING_PROGRAMS and warps > FEWEST_WARPS:
        warps //= 2
    return warps


def candidates_sell(slices: int, blocks: int) -> list[tuple[int, int]]:
    """The (parts, warps) worth timing for a weight, the default ones first.

    slices, blocks : of the weight, and of its longest slice
    """
    parts = default_parts(slices, blocks)
    every = [
        (parts, warps)
        for parts, warps in product((4, 8, 16, 32, 64, 128), (4, 8, 16, 32))
        if warps <= parts <= max(FEWEST_WARPS, blocks) and parts <= 4 * warps
    ]
    return list(dict.fromkeys([(parts, default_warps(slices, parts)), *every]))
