"""y = x · Wᵀ for a bitmap weight and up to 64 tokens: tiles of it are expanded in registers, then multiplied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_bitmap import dense_tile_16, load_bytes
from llmprune.triton_kernels._launch import OPTIONS, PTX, aligned, blocks, on_device
from llmprune.triton_kernels._sum_parts_kernel import Sums
from llmprune.triton_kernels._tiles import multiply_tile, store_tile
from llmprune.triton_kernels.configs_bitmap import BitmapDot
from llmprune.triton_kernels.pack_bitmap import BitmapWeight

__all__ = ["launch_matmul_bitmap", "matmul_bitmap_kernel"]


@triton.jit
def matmul_bitmap_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    row_starts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """A tile of ROWS outputs by TOKENS tokens, over one of PARTS shares of the inputs.

    x (M, K), words int32, two values each; masks int32 and offsets int16 (N, WORDS), row_starts int32 (N,), bias (N,);
    y (M, N), or (PARTS, M, N) float32 if there are several parts
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    tokens = tl.arange(0, TOKENS)
    share: tl.constexpr = (K + INPUTS * PARTS - 1) // (INPUTS * PARTS) * INPUTS
    row_ok = rows < N
    token_ok = tokens < M
    row_starts = tl.load(row_starts_ptr + rows, mask=row_ok, other=0)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(0, share, INPUTS, num_stages=STAGES):
        first = part * share + step
        words = first // 32 + tl.arange(0, INPUTS // 8) // 4
        inputs = first + tl.arange(0, INPUTS)
        word_at = rows[:, None] * WORDS + words[None, :]
        word_ok = row_ok[:, None] & (words < WORDS)[None, :]
        byte, before = load_bytes(masks_ptr, offsets_ptr, word_at, word_ok, INPUTS, PTX)
        before += row_starts[:, None]
        weight = dense_tile_16(words_ptr, before, byte, x_ptr.dtype.element_ty, ROWS, INPUTS, PTX)
        x_ok = token_ok[:, None] & (inputs < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * K + inputs[None, :], mask=x_ok, other=0.0)
        total = multiply_tile(weight, x, total, PTX)
    store_tile(total, rows, tokens, part, bias_ptr, y_ptr, M, N, HAS_BIAS)


def launch_matmul_bitmap(x: Tensor, weight: BitmapWeight, *, bias: Tensor | None, config: BitmapDot) -> Tensor:
    """Launch it. x (M, in_features), M at most config.tokens; bias (out_features,) → (M, out_features) in x's dtype."""
    M, N = len(x), weight.out_features
    sums = Sums(x, N, bias=bias, parts=config.parts)
    with on_device(x):
        matmul_bitmap_kernel[(blocks(N, config.rows), config.parts)](
            aligned(x),
            weight.values.view(torch.int32),
            weight.masks,
            weight.offsets,
            weight.row_starts,
            sums.bias,
            sums.out,
            M,
            N,
            K=weight.in_features,
            WORDS=weight.masks.shape[1],
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
