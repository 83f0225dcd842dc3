"""What a method needs to know of a linear's inputs, summed over the calibration tokens as they pass.

A statistic is a sum, so it can be taken in any order and merged across batches, experts and processes. Sums are
float32 and in place; `Hessian` computes only the upper block triangle, since XᵀX is symmetric. On NVIDIA GPUs inputs in
bfloat16 are multiplied as they are, many times as fast as in float32: the products of two such numbers are exact in
float32, in which they are added up.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmprune.errors import NumericError

__all__ = ["FeatureNorm", "Hessian", "PairedHessian", "Statistic", "factor_dtype", "mixed", "unpaired"]

BLOCK = 512
"""Columns per block of the Hessian update. On two AVX-512 cores, 512 took 0.62 of the time of one full product at
1 536 columns; smaller blocks lose in the products what they save in the triangle."""

CONSTANT = 1e-3
"""A feature whose variance is at most this share of its mean square is constant. Rounding alone makes about 1e-6 of the
mean square in float32, of one sign in all features: of 512 that depended on each other closely, with means of 80
standard deviations (1.6e-4), it left a matrix that was not positive definite even when damped; with 30 (1.1e-3) not."""


class Statistic(Protocol):
    """A streaming sum over a linear's inputs."""

    tokens: float

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, inputs: Tensor) -> None:
        """Add the rows of `inputs` (tokens, in_features), any float dtype."""

    def compare(self, inputs: Tensor, dense: Tensor) -> None:
        """After `update(inputs)`: what the dense model has in their place."""

    def merge(self, other: Statistic) -> None:
        """Add another statistic of the same linear."""

    def addends(self) -> list[Tensor]:
        """Views on all that adds up besides `tokens`, for processes that have met different tokens."""

    def check(self) -> None:
        """Raise NumericError if NaN or inf came in."""

    def scaled(self, factor: float) -> Statistic:
        """The same statistic with sums and tokens multiplied by `factor`."""


class FeatureNorm:
    """Root mean square of every input feature: what Wanda multiplies weights by.

    `norms` is (in_features,) float32, ‖X_j‖₂ / √tokens.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.squares = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens: float = 0

    def update(self, inputs: Tensor) -> None:
        """Add the rows of `inputs` (tokens, in_features)."""
        self.squares += inputs.float().square().sum(0)
        self.tokens += inputs.shape[0]

    def compare(self, inputs: Tensor, dense: Tensor) -> None:
        """Norms are of the inputs alone."""

    def merge(self, other: Statistic) -> None:
        """Add another one's sums."""
        assert isinstance(other, FeatureNorm)
        self.squares += other.squares
        self.tokens += other.tokens

    def addends(self) -> list[Tensor]:
        """The squares."""
        return [self.squares]

    def check(self) -> None:
        """Raise NumericError if NaN or inf came in."""
        _require_finite(self.squares)

    def scaled(self, factor: float) -> FeatureNorm:
        """The same norms, counting `factor` times the tokens."""
        result = FeatureNorm(len(self.squares), self.squares.device)
        result.squares = self.squares * factor
        result.tokens = self.tokens * factor
        return result

    @property
    def norms(self) -> Tensor:
        """(in_features,) float32."""
        return (self.squares / max(self.tokens, 1e-30)).sqrt()


class Hessian:
    """H = XᵀX / tokens, (in_features, in_features) float32: half the second derivative of a linear's squared error."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens: float = 0

    def update(self, inputs: Tensor) -> None:
        """Add XᵀX of the rows of `inputs` (tokens, in_features)."""
        inputs = inputs.to(factor_dtype(inputs.dtype, inputs.device))
        for start in range(0, inputs.shape[1], BLOCK):
            rows = slice(start, start + BLOCK)
            _add_product(self.upper[rows, start:], inputs[:, rows], inputs[:, start:])
        self.tokens += inputs.shape[0]

    def compare(self, inputs: Tensor, dense: Tensor) -> None:
        """XᵀX is of the inputs alone; see `PairedHessian`."""

    def merge(self, other: Statistic) -> None:
        """Add another one's sums."""
        assert isinstance(other, Hessian)
        self.upper += other.upper
        self.tokens += other.tokens

    def addends(self) -> list[Tensor]:
        """The upper block triangle in strips of rows: little more than half of the matrix."""
        return [self.upper[start : start + BLOCK, start:] for start in range(0, len(self.upper), BLOCK)]

    def check(self) -> None:
        """Raise NumericError if NaN or inf came in: they always reach the diagonal."""
        _require_finite(self.upper.diagonal())

    def scaled(self, factor: float) -> Hessian:
        """The same matrix, counting `factor` times the tokens."""
        result = Hessian(len(self.upper), self.upper.device)
        result.upper = self.upper * factor
        result.tokens = self.tokens * factor
        return result

    @property
    def norms(self) -> Tensor:
        """(in_features,) float32, ‖X_j‖₂ / √tokens, as `FeatureNorm` has them."""
        return (self.upper.diagonal() / max(self.tokens, 1e-30)).sqrt()

    @property
    def triangle(self) -> Tensor:
        """(in_features, in_features) float32, the matrix from the diagonal upwards, anything below: a new tensor."""
        return self.upper / max(self.tokens, 1e-30)

    @property
    def matrix(self) -> Tensor:
        """(in_features, in_features) float32, symmetric: a new tensor at each call."""
        result = self.triangle.triu_()
        result += result.triu(1).T
        return result


class PairedHessian(Hessian):
    """A Hessian with what the dense model's inputs differ in: enough to aim at the dense model's outputs.

    cross : (X_d − X)ᵀX summed, (in_features, in_features), X_d the dense inputs at the same tokens
    sums, shifts : ΣX and Σ(X_d − X), (in_features,)
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.cross = torch.zeros_like(self.upper)
        self.sums, self.shifts = torch.zeros_like(self.upper[0]), torch.zeros_like(self.upper[0])

    def compare(self, inputs: Tensor, dense: Tensor) -> None:
        """Add (X_d − X)ᵀX of `dense` and `inputs` (tokens, in_features)."""
        inputs = inputs.to(factor_dtype(inputs.dtype, inputs.device))
        difference = dense.float() - inputs.float()
        # Where inputs stay in bfloat16, so must the difference: rounded, but no more than what it is the difference of.
        _add_product(self.cross, difference.to(inputs.dtype), inputs)
        self.sums += inputs.sum(0, dtype=torch.float32)
        self.shifts += difference.sum(0)

    def merge(self, other: Statistic) -> None:
        """Add another one's sums."""
        super().merge(other)
        assert isinstance(other, PairedHessian)
        self.cross += other.cross
        self.sums += other.sums
        self.shifts += other.shifts

    def addends(self) -> list[Tensor]:
        """The Hessian's, and its own."""
        return [*super().addends(), self.cross, self.sums, self.shifts]

    def check(self) -> None:
        """Raise NumericError if NaN or inf came in."""
        super().check()
        _require_finite(self.shifts)

    def scaled(self, factor: float) -> PairedHessian:
        """The same matrices, counting `factor` times the tokens."""
        result = PairedHessian(len(self.upper), self.upper.device)
        for name in ("upper", "cross", "sums", "shifts"):
            setattr(result, name, getattr(self, name) * factor)
        result.tokens = self.tokens * factor
        return result

    def centre(self) -> None:
        """Take the inputs' means away, in place: what is left to do for a linear whose bias is refitted.

        Of a feature that hardly moves about a large mean only rounding would be left, negative even. It counts as
        constant: the bias makes up for it.
        """
        count, least = max(self.tokens, 1e-30), CONSTANT * self.upper.diagonal()
        self.upper.addr_(self.sums, self.sums, alpha=-1 / count)
        self.cross.addr_(self.shifts, self.sums, alpha=-1 / count)
        constant = self.upper.diagonal() <= least
        self.upper.masked_fill_(constant, 0).masked_fill_(constant[:, None], 0)
        self.cross.masked_fill_(constant, 0)  # not the rows: what the dense inputs differ in may move all the same
        self.sums.zero_()
        self.shifts.zero_()

    def missing(self, weight: Tensor) -> Tensor:
        """W (X_d − X)ᵀX / tokens, (out_features, in_features) float32: what a linear's outputs miss, times its inputs.

        To be asked once: the cross moments, as large as the Hessian, are let go of.
        """
        result = weight @ self.cross
        self.cross = self.cross.new_empty(0)
        return result.div_(max(self.tokens, 1e-30))


def factor_dtype(inputs: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which inputs are multiplied on a device: float32, or bfloat16 where that loses nothing."""
    exact = inputs == torch.bfloat16 and device.type == "cuda" and torch.version.cuda is not None
    return torch.bfloat16 if exact else torch.float32


def unpaired(kind: type[Statistic]) -> type[Statistic]:
    """The statistic to take where a dense run has nothing to compare."""
    return Hessian if kind is PairedHessian else kind


def mixed(own: Statistic, pool: Statistic, trusted_tokens: float) -> Statistic:
    """An expert's statistic, filled up with its layer's pooled one where the expert met too few tokens.

    The own tokens count fully; the pool stands in for the ones missing to `trusted_tokens`. With no token of its own
    the pool stands alone.
    """
    missing = max(0.0, trusted_tokens - own.tokens)
    result = pool.scaled(missing / max(pool.tokens, 1e-30))
    result.merge(own)
    return result


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += leftᵀ right, added up in float32.

    Parameters
    ----------
    sums : (columns of left, columns of right) float32
    left, right : (tokens, columns), both float32, or both bfloat16 on an NVIDIA GPU
    """
    if left.dtype == torch.float32:
        torch.addmm(sums, left.T, right, out=sums)
    else:
        sums += torch.mm(left.T, right, out_dtype=torch.float32)


def _require_finite(sums: Tensor) -> None:
    broken = (~torch.isfinite(sums)).nonzero().flatten()
    if len(broken):
        raise NumericError(
            f"NaN or inf in the inputs, in {len(broken)} of {len(sums)} features (first: {broken[0]}). "
            "float16 models overflow easily: try --dtype bfloat16 or float32."
        )
