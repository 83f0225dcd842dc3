"""Which path a product takes: by device, pattern, number of tokens and shape.

What `llmprune tune` measured on this machine decides. Without measurements a table does, made from those that we took
(docs/results): few tokens go to the kernels that read the packed weight, many to the dense product behind an
expansion, whose cost they share. Where there is no kernel for few tokens, the weight is held dense, with one notice:
expanding it for every token would be several times slower than the dense model.
"""

from __future__ import annotations

import warnings

from llmprune.runtime import timing
from llmprune.runtime.paths import DENSE, HOLDING, paths
from llmprune.runtime.weight import Path, SparseWeight

__all__ = ["MOST_TOKENS", "choose", "has_kernel", "path_for", "rounded"]

MOST_TOKENS = 4096
"""More tokens than this take the path of this many."""

FEW_TOKENS = {"cpu": {"kernel": 8}, "cuda": {"kernel": 64, "sell": 4}}
"""By device, up to how many tokens each kernel is taken without measurements. The GPU's product with bitmaps is not
among them: on datacenter cards it is near its limit, so it waits for a measurement."""

_told: set[str] = set()


def rounded(tokens: int) -> int:
    """The power of two that stands for so many tokens: 1, 2, 4, … `MOST_TOKENS`."""
    return min(MOST_TOKENS, 1 << (tokens - 1).bit_length())


def path_for(weight: SparseWeight, tokens: int) -> Path:
    """The path for a product with so many tokens, and with any number that is rounded to the same."""
    ways = paths(weight, rounded(tokens))
    return ways[choose(weight, tokens, tuple(ways))]()


def choose(weight: SparseWeight, tokens: int, names: tuple[str, ...]) -> str:
    """The name of the path for so many tokens, out of those that are possible."""
    if not has_kernel(weight):
        _tell_once(weight)
        return DENSE
    measured = timing.measured(weight, rounded(tokens))
    held = timing.may_hold(weight.device)
    able = {name: measured[name] for name in names if name in measured and (held or name not in HOLDING)}
    if able:
        return min(able, key=able.__getitem__)
    kernels = FEW_TOKENS[weight.device.type]
    named = [name for name, most in kernels.items() if name in names and tokens <= most]
    return next(iter(named), "expand32" if "expand32" in names else "expand")


def has_kernel(weight: SparseWeight) -> bool:
    """Whether one token can be multiplied without making the weight dense."""
    return not FEW_TOKENS.get(weight.device.type, {}).keys().isdisjoint(paths(weight, 1))


def _tell_once(weight: SparseWeight) -> None:
    what = f"{weight.device.type}, {str(weight.dtype).removeprefix('torch.')}"
    if what not in _told:
        _told.add(what)
        warnings.warn(
            f"there is no kernel for packed weights here ({what}): they are unpacked when they are first used and "
            "held dense, which takes the dense model's memory and time.",
            stacklevel=2,
        )
