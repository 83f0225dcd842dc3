"""y = x · Wᵀ for a 2:4 weight on dense tensor cores: a tile of the weight is expanded in registers, then multiplied.

It reads the packed bytes only, and works wherever Triton's `tl.dot` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_24 import expand_24, halves
from llmprune.triton_kernels._launch import OPTIONS, PTX, aligned, as_words, blocks, on_device
from llmprune.triton_kernels._sum_parts_kernel import Sums
from llmprune.triton_kernels._tiles import multiply_tile, store_tile
from llmprune.triton_kernels.configs_24 import ExpandDot

__all__ = ["expand_dot_24_kernel", "launch_expand_dot_24"]


@triton.jit
def _dense_tile(
    kept: tl.tensor, bits: tl.tensor, dtype: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, PTX: tl.constexpr
) -> tl.tensor:
    """kept (ROWS, INPUTS/16, 4) int32 and bits (ROWS, INPUTS/16, 1) int16 → (ROWS, INPUTS) of `dtype`."""
    even, odd = expand_24(kept, bits, PTX)
    column0, column1 = halves(even, dtype)
    column2, column3 = halves(odd, dtype)
    # join adds a last axis, so the inner pairs must hold what lies two columns apart.
    return tl.reshape(tl.join(tl.join(column0, column2), tl.join(column1, column3)), [ROWS, INPUTS])


@triton.jit
def expand_dot_24_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    index_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """A tile of ROWS outputs by TOKENS tokens, over one of PARTS shares of the inputs.

    x (M, K), values (N, K/4) int32, index (N, K/16) int16, bias (N,);
    y (M, N), or (PARTS, M, N) float32 if there are several parts
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    tokens = tl.program_id(2).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    chunks_of_row: tl.constexpr = K // 16
    share: tl.constexpr = (K + INPUTS * PARTS - 1) // (INPUTS * PARTS) * INPUTS
    row_ok = rows < N
    token_ok = tokens < M
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(0, share, INPUTS, num_stages=STAGES):
        first = part * share + step
        chunk = first // 16 + tl.arange(0, INPUTS // 16)
        weight_ok = (row_ok[:, None] & (chunk < chunks_of_row)[None, :])[:, :, None]
        at = (rows[:, None] * chunks_of_row + chunk[None, :])[:, :, None]
        kept = tl.load(values_ptr + at * 4 + tl.arange(0, 4), mask=weight_ok, other=0)
        bits = tl.load(index_ptr + at, mask=weight_ok, other=0)
        inputs = first + tl.arange(0, INPUTS)
        x_ok = token_ok[:, None] & (inputs < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * K + inputs[None, :], mask=x_ok, other=0.0)
        weight = _dense_tile(kept, bits, x_ptr.dtype.element_ty, ROWS, INPUTS, PTX)
        total = multiply_tile(weight, x, total, PTX)
    store_tile(total, rows, tokens, part, bias_ptr, y_ptr, M, N, HAS_BIAS)


def launch_expand_dot_24(x: Tensor, values: Tensor, index: Tensor, *, bias: Tensor | None, config: ExpandDot) -> Tensor:
    """Launch it. x (M, K), values (N, K/2), index (N, K/8), bias (N,) → (M, N) in x's dtype."""
    M, N, K = len(x), len(values), x.shape[1]
    sums = Sums(x, N, bias=bias, parts=config.parts)
    with on_device(x):
        expand_dot_24_kernel[(blocks(N, config.rows), config.parts, blocks(M, config.tokens))](
            aligned(x),
            as_words(values, torch.int32),
            as_words(index, torch.int16),
            sums.bias,
            sums.out,
            M,
            N,
            K=K,
            ROWS=config.rows,
            TOKENS=config.tokens,
            INPUTS=config.inputs,
            PARTS=config.parts,
            STAGES=config.stages,
            HAS_BIAS=sums.has_bias,
            PTX=PTX,
            num_warps=config.warps,
            **OPTIONS,
        )
    return sums.total()
