"""How far a kernel's result is from the truth: two numbers, and the places where it is worst.

Both errors are relative to the root mean square of the truth. An error relative to each entry would be large wherever
the truth happens to be near zero, and an absolute one would mean nothing without the size of the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "assert_close", "difference"]

SHOWN = 5
"""So many of the worst entries are told."""

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Difference:
    """How far `actual` is from `truth`.

    max_error, rms_error : largest and root-mean-square difference, in units of the truth's root mean square; inf where
        something is not finite that should be (memory that was never written shows as NaN)
    worst : one line for each of the worst entries: coordinates, got, expected
    """

    max_error: float
    rms_error: float
    worst: tuple[str, ...]

    def __str__(self) -> str:
        return "\n  ".join([f"max error {self.max_error:.3g}, rms error {self.rms_error:.3g}", *self.worst])


def difference(actual: Tensor, truth: Tensor) -> Difference:
    """Compare a result with the truth, in float64.

    Parameters
    ----------
    actual, truth : of one shape, any dtypes and devices; `truth` finite

    Raises
    ------
    ValueError : if the shapes differ
    """
    if actual.shape != truth.shape:
        raise ValueError(f"shapes differ: got {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not actual.numel():
        return Difference(0.0, 0.0, ())
    got, want = actual.detach().cpu().double(), truth.detach().cpu().double()
    error = (got - want).abs().nan_to_num(nan=torch.inf)
    scale = max(float(want.square().mean().sqrt()), TINY)
    return Difference(float(error.max()) / scale, float(error.square().mean().sqrt()) / scale, _worst(error, got, want))


def _worst(error: Tensor, got: Tensor, want: Tensor) -> tuple[str, ...]:
    """A line for each of the largest errors, none for entries that are right."""
    sizes, places = error.flatten().topk(min(SHOWN, error.numel()))
    lines = []
    for place in places[sizes > 0]:
        at = tuple(int(i) for i in torch.unravel_index(place, error.shape))
        lines.append(f"at {at}: got {got[at]:.6g}, expected {want[at]:.6g}")
    return tuple(lines)


def assert_close(actual: Tensor, truth: Tensor, *, max_error: float, rms_error: float | None = None) -> None:
    """Fail, with the worst coordinates, unless both errors stay within their bounds.

    Parameters
    ----------
    max_error, rms_error : see `Difference`; rms_error None: a quarter of max_error, about what honest rounding shows

    Raises
    ------
    AssertionError : if one is exceeded
    """
    rms_error = max_error / 4 if rms_error is None else rms_error
    found = difference(actual, truth)
    if found.max_error > max_error or found.rms_error > rms_error:
        raise AssertionError(f"{found}\n  allowed: max {max_error:.3g}, rms {rms_error:.3g}")
