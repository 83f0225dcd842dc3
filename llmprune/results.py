"""What a run found out: rows of plain data that the pipeline writes and everything after it reads.

They hold no tensors, so that they outlive the model, and become JSON by `dataclasses.asdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PrunedWeight", "SkippedWeight", "TunedPart", "percent_with_error", "recovery", "told_apart", "with_error"]


@dataclass(frozen=True)
class PrunedWeight:
    """One weight that was pruned.

    A weight is a matrix (out_features, in_features). It may be a whole parameter, the transpose of one (GPT-2's
    `Conv1D`) or one expert's slice of a 3-D parameter; the first four fields say which.
    """

    name: str
    """Unique within the model: the parameter's name, and the expert in brackets where there is one:
    `model.layers.0.mlp.experts.down_proj[3]`."""
    parameter: str
    """Name of the parameter in `model.named_parameters()`."""
    expert: int | None
    """Index along the first axis of a 3-D parameter, or None."""
    input_axis: int
    """Which axis of the stored matrix (2-D, after taking the expert) runs over the inputs: 1, or 0 where the
    transpose is stored."""
    layer: int
    """Index of the decoder layer."""
    shape: tuple[int, int]
    """(out_features, in_features)."""
    pattern: str
    """As `str(pattern)`: "2:4" or "50%"."""
    zeros: int
    """Weights that are exactly zero after rounding to the checkpoint's dtype."""
    scope: str
    """Where the zeros were counted out: "group" (N:M), "row" or "matrix"."""
    error: float | None
    """Relative output error ‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ on the first batch of the linear's inputs; None if no token came."""
    tokens: int
    """Calibration tokens that met this weight."""
    seconds: float
    """Its share of the solve."""
    step: float | None = None
    """How far it was aimed at what the dense model's own inputs would give, 0 to 1; None where that was not asked."""
    notes: tuple[str, ...] = field(default=())
    """What went other than usual: damping raised, cold expert, pruned last because it is used twice."""


@dataclass(frozen=True)
class SkippedWeight:
    """A matrix inside the decoder layers that was left dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class TunedPart:
    """A part of a layer whose kept weights were tuned together."""

    part: str
    """Name of the module, such as `model.layers.0.mlp`; "model" for the distillation of all layers together."""
    before: float
    """On held-out windows, the mean squared error against the dense model's part, relative to its output's mean square;
    of "model" the divergence from the dense model's predictions, in nats a token."""
    after: float
    """The same after tuning: never more."""
    passes: int
    """How often the calibration windows were gone through."""


def recovery(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> float | None:
    """How much of the dense model is left, in per cent, from two rows of an evaluation that measure the same.

    Of a perplexity dense / pruned, of a score pruned / dense. None where the divisor is zero: nothing to recover.
    """
    part, whole = float(pruned["value"]), float(dense["value"])
    if dense.get("kind", "perplexity") == "perplexity":  # reports of schema 1 hold perplexities only, and no kind
        part, whole = whole, part
    return 100 * part / whole if whole else None


def told_apart(models: Sequence[str | Path]) -> list[str]:
    """Short names for several models, hub ids or folders: the shortest ends of their paths that differ."""
    whole = [Path(model).resolve().parts if Path(model).exists() else Path(model).parts for model in models]
    for length in range(1, max(map(len, whole)) + 1):
        ends = ["/".join(parts[-length:]) for parts in whole]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{parts[-1]} ({index})" for index, parts in enumerate(whole, start=1)]


def with_error(value: float, error: float | None) -> str:
    """A number and its standard error, for people: 16.13 ± 0.72, 1884 ± 220."""
    told = "n/a" if error is None else f"{error:.2g}" if error < 99.5 else f"{round(error, -1):.0f}"
    return f"{value:.4g} ± {told}"


def percent_with_error(value: float, error: float | None) -> str:
    """A fraction and its standard error in per cent, for people."""
    return f"{100 * value:.2f} ± {'n/a' if error is None else f'{100 * error:.2f}'} %"
