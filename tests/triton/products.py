"""A product with a weight of any form: its activations, its bias, and what it must be."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CUTTING", "ROUNDING", "Held", "bias_for", "tokens_for", "truth"]

ROUNDING = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""What the largest entries may be off, in units of the truth's root mean square: a rounding to the output's dtype."""

CUTTING = {torch.bfloat16: 3e-2, torch.float16: 2e-3}
"""The same in Triton's interpreter, which cuts a float32 off to bfloat16 where a GPU rounds."""


class Held(Protocol):
    """A weight that is also held dense, (N, K)."""

    @property
    def dense(self) -> Tensor:
        """What it was packed from."""


def tokens_for(weight: Held, count: int, seed: int = 1) -> Tensor:
    """Activations (count, K) in the weight's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, weight.dense.shape[1], generator=generator).to(weight.dense.dtype)


def bias_for(weight: Held) -> Tensor:
    """A bias (N,) in the weight's dtype."""
    return torch.linspace(-3, 3, len(weight.dense)).to(weight.dense.dtype)


def truth(x: Tensor, weight: Held, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias in float64."""
    y = x.double() @ weight.dense.double().T
    return y if bias is None else y + bias.double()
