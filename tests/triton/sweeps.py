"""Blocks for SparseGPT's sweep, and what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.triton_kernels.sparsegpt_sweep import sparsegpt_sweep, sparsegpt_sweep_torch

__all__ = ["block_of", "check_sweep"]

Block = tuple[Tensor, Tensor, Tensor]


def block_of(count: int, rows: int, *, seed: int = 0, device: str = "cpu") -> Block:
    """columns and keep (count, rows), and the factor U of a Hessian of correlated inputs (count, count)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * count, count, generator=generator, dtype=torch.float64)
    inputs += inputs.mean(1, keepdim=True)
    inverse = torch.linalg.inv(inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(count))
    factor = torch.linalg.cholesky(inverse, upper=True)
    columns = torch.randn(count, rows, generator=generator)
    keep = torch.rand(count, rows, generator=generator) < 0.5
    return columns.to(device), keep.to(device), factor.float().to(device)


def check_sweep(block: Block, pattern: tuple[int, int] | None, *, tolerance: float = 1e-4) -> None:
    """The kernel changes columns and keep, and returns errors, as its twin does in float64."""
    columns, keep, factor = block
    expected, mask = columns.double(), keep.clone()
    errors = sparsegpt_sweep_torch(expected, mask, factor.double(), pattern=pattern)
    found = sparsegpt_sweep(columns, keep, factor, pattern=pattern)
    assert torch.equal(keep, mask)
    assert torch.equal(columns == 0, ~keep)
    torch.testing.assert_close(columns.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), errors, rtol=tolerance, atol=tolerance)
