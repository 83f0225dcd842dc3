"""Patterns: which zeros a pruned weight may have.

`NM(n, m)` keeps exactly n of every m consecutive inputs of an output row: `2:4` keeps two of four, the pattern of
sparse tensor cores (Mishra et al., 2021, https://arxiv.org/abs/2104.08378). Other tools count the pruned ones:
their 1:4 is our 3:4. `Unstructured(sparsity)` zeroes that fraction of a weight, wherever it hurts least.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from llmprune.errors import UserError

__all__ = ["NM", "Pattern", "Unstructured", "parse_pattern"]


@dataclass(frozen=True)
class Unstructured:
    """`sparsity` (0 < s < 1) of the weights become zero, in any place."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(
                f"sparsity is the fraction of zeros and lies between 0 and 1, both excluded; got {self.sparsity:g}. "
                "Write 0.5 or 50% for half."
            )

    @property
    def slug(self) -> str:
        """The pattern as part of a file name, at most six digits: `50pct`, `62.5pct`."""
        return f"{100 * self.sparsity:g}pct"

    def zeros_of(self, count: int) -> int:
        """How many of `count` weights become zero: the nearest whole number."""
        return round(self.sparsity * count)

    def fits(self, in_features: int) -> bool:
        """Whether a weight with so many inputs can hold this pattern: always."""
        return True

    def __str__(self) -> str:
        """A percentage with all its digits, so that `parse_pattern` finds the same number again."""
        return f"{Decimal(repr(float(self.sparsity))).scaleb(2):f}%"


@dataclass(frozen=True)
class NM:
    """Exactly `n` of every `m` consecutive inputs are **kept** (0 < n < m)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(
                f"N:M keeps N of every M consecutive inputs, so 0 < N < M is needed; got {self.n}:{self.m}. "
                "2:4 is the pattern of sparse tensor cores."
            )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.n / self.m

    @property
    def slug(self) -> str:
        """The pattern as part of a file name (no colon): `2of4`."""
        return f"{self.n}of{self.m}"

    def zeros_of(self, count: int) -> int:
        """How many of `count` weights become zero (`count` is a multiple of m)."""
        return count // self.m * (self.m - self.n)

    def fits(self, in_features: int) -> bool:
        """Whether a weight with so many inputs divides into whole groups of m."""
        return in_features % self.m == 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Read a sparsity as people write it: `0.5`, `"50%"`, `"2:4"`. What `str` makes of a pattern is read back exactly.

    Raises
    ------
    UserError
        for anything else, with the three forms that are understood.
    """
    if isinstance(text, Unstructured | NM):
        return text
    written = str(text).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", written):
        return NM(int(match[1]), int(match[2]))
    percent = written.endswith("%")
    try:
        # The decimal point is moved in the text: dividing by 100 would round once more.
        number = float(f"{written[:-1].strip()}e-2" if percent else written)
    except ValueError:
        raise UserError(
            f"sparsity is a fraction (0.5), a percentage (50%) or N:M, N kept of every M (2:4); got {written!r}."
        ) from None
    if percent and not 0 < number < 1:
        raise UserError(f"sparsity in per cent is the share of zeros, more than 0% and less than 100%; got {written}.")
    if number >= 1 and not percent:
        raise UserError(
            f"sparsity is a fraction below 1, a percentage (50%) or N:M (2:4); got {written}. "
            f"If you meant {number:g} %, write {number:g}%."
        )
    return Unstructured(number)
