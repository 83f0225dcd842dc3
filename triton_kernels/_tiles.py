"""A tile of a weight, expanded in registers: multiplied with tokens, and what comes of it written out.

The expanded tile is the left operand (yᵀ = W · xᵀ): on an H100 that is the form which takes the fast path, and Triton
3.6 cannot compile the other one there. The tensor cores multiply the zeros too; what is saved is the reading.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["multiply_tile", "store_tile"]


@triton.jit
def multiply_tile(weight: tl.tensor, x: tl.tensor, total: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """total (ROWS, TOKENS) + weight (ROWS, INPUTS) · x (TOKENS, INPUTS), transposed."""
    if not PTX:  # the interpreter multiplies bfloat16 as if it were an integer
        weight = weight.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(weight, tl.trans(x), total)


@triton.jit
def store_tile(
    total: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    part: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Write total (ROWS, TOKENS) plus bias (N,) to y (M, N), or to one part of y (PARTS, M, N).

    rows (ROWS,), tokens (TOKENS,) : which outputs and tokens the tile holds; those beyond N and M are left out
    """
    row_ok = rows < N
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    y_at = (part * M + tokens)[None, :] * N + rows[:, None]
    tl.store(y_ptr + y_at, total.to(y_ptr.dtype.element_ty), mask=(tokens < M)[None, :] & row_ok[:, None])
