"""The evaluations of one document: the dense model's number beside the pruned one's.

A row without a kind comes from schema 1 and is a perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from llmprune.results import recovery

__all__ = ["Divergence", "Measure", "Value", "measures_of"]


@dataclass(frozen=True)
class Value:
    """A number and its standard error, None where it is unknown."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Divergence:
    """How far the pruned model's predictions are from the dense one's."""

    kl: Value
    """Nats a token."""
    agreement: Value
    """Fraction of the predictions with the same most likely token."""
    protocol: str


@dataclass(frozen=True)
class Measure:
    """One thing that was measured on both models."""

    kind: str
    """"perplexity" or "zero_shot"."""
    subject: str
    """The text or the task."""
    metric: str
    dense: Value
    pruned: Value | None
    """None where the second evaluation did not end."""
    recovery: float | None
    """How much of the dense model is left, in per cent."""
    divergence: Divergence | None
    count: int
    """Of tokens or items."""
    protocol: str

    @property
    def is_share(self) -> bool:
        """Whether the values are fractions of all items, not perplexities."""
        return self.kind != "perplexity"

    @property
    def protocols(self) -> list[str]:
        """How all of it was measured."""
        return [self.protocol] if self.divergence is None else [self.protocol, self.divergence.protocol]


def measures_of(document: Mapping[str, Any]) -> list[Measure]:
    """All evaluations, in the order in which they were made."""
    return [_measure(before, after) for before, after in zip_longest(document["before"], document["after"])]


def _measure(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Measure:
    kind = before.get("kind", "perplexity")
    plain = kind == "perplexity"
    divergence = (after or {}).get("divergence")
    return Measure(
        kind=kind,
        subject=before["dataset"] if plain else before["task"],
        metric="perplexity" if plain else before["metric"],
        dense=Value(before["value"], before["standard_error"]),
        pruned=None if after is None else Value(after["value"], after["standard_error"]),
        recovery=None if after is None else recovery(before, after),
        divergence=None if divergence is None else _divergence(divergence),
        count=before["tokens"] if plain else before["items"],
        protocol=before["protocol"],
    )


def _divergence(row: Mapping[str, Any]) -> Divergence:
    return Divergence(
        kl=Value(row["kl"], row["kl_standard_error"]),
        agreement=Value(row["top1_agreement"], row["top1_standard_error"]),
        protocol=row["protocol"],
    )
