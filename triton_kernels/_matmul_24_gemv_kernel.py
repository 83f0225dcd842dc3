"""y = x · Wᵀ for a 2:4 weight and a few tokens, without tensor cores: fetch the activations that kept entries meet.

Expanding the weight would multiply by zeros half of the time. Here a group's four activations lie in two registers, and
one byte permutation brings the two that count beside the two kept entries: two multiply-adds for four weights.

A thread takes a chunk of 16 inputs of one row a step: 16 bytes of values, 16 bits of index, 32 bytes of activations. As
each thread has exactly one chunk, all tensors lie in the threads alike and nothing is exchanged before the last sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_24 import permute_bytes, pick_24, unpack_pair
from llmprune.triton_kernels._launch import OPTIONS, PTX, as_words, blocks, on_device
from llmprune.triton_kernels._sum_parts_kernel import Sums
from llmprune.triton_kernels.configs_24 import Gemv

__all__ = ["gemv_24_kernel", "launch_gemv_24"]


@triton.jit
def _load_steps(
    values_at: tl.tensor,
    index_at: tl.tensor,
    chunk: tl.tensor,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tuple:
    """Ask for the weight of UNROLL steps: for each (values, index)."""
    loaded: tl.tuple = ()
    for u in tl.static_range(UNROLL):
        v = values_at + u * CHUNKS * 4
        i = index_at + u * CHUNKS
        if EVEN:
            loaded += ((tl.load(v), tl.load(i)),)
        else:
            ok = chunk + u * CHUNKS < K // 16
            loaded += ((tl.load(v, mask=ok, other=0), tl.load(i, mask=ok, other=0)),)
    return loaded


@triton.jit
def gemv_24_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    index_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """ROWS outputs of TOKENS tokens, over one of PARTS shares of the inputs; ROWS · CHUNKS threads.

    x (M, K/4) int64, values (N, K/4) int32, index (N, K/16) int16, bias (N,);
    y (M, N), or (PARTS, M, N) float32 if there are several parts.
    All tensors have the axes (row, chunk, group of the chunk).
    """
    STEP: tl.constexpr = CHUNKS * UNROLL
    ROUNDS: tl.constexpr = (K // 16 + STEP * PARTS - 1) // (STEP * PARTS)
    EVEN: tl.constexpr = ROUNDS * STEP * PARTS == K // 16
    first_row = tl.program_id(0) * ROWS
    first_token = tl.program_id(2) * TOKENS
    # Rows and tokens beyond the last are done as the last again, and not stored.
    row = tl.minimum(first_row + tl.arange(0, ROWS), N - 1)[:, None, None]
    chunk = (tl.program_id(1) * ROUNDS * STEP + tl.arange(0, CHUNKS))[None, :, None]
    group = tl.arange(0, 4)[None, None, :]
    values_at = values_ptr + (row * (K // 16) + chunk) * 4 + group
    index_at = index_ptr + row * (K // 16) + chunk
    x_at = x_ptr + (chunk + row * 0) * 4 + group
    totals: tl.tuple = ()
    for _ in tl.static_range(TOKENS):
        totals += (tl.zeros([ROWS, CHUNKS, 4], tl.float32),)
    for _ in range(0, ROUNDS):
        loaded = _load_steps(values_at, index_at, chunk, K, CHUNKS, UNROLL, EVEN)
        for u in tl.static_range(UNROLL):
            kept, bits = loaded[u]
            selectors = pick_24(bits, PTX)
            w0, w1 = unpack_pair(kept, DTYPE)
            sums: tl.tuple = ()
            for token in tl.static_range(TOKENS):
                x = x_at + tl.minimum(first_token + token, M - 1) * (K // 4) + u * CHUNKS * 4
                four = tl.load(x) if EVEN else tl.load(x, mask=chunk + u * CHUNKS < K // 16, other=0)
                picked = permute_bytes(four.to(tl.int32), (four >> 32).to(tl.int32), selectors, PTX)
                x0, x1 = unpack_pair(picked, DTYPE)
                sums += (tl.fma(w1, x1, tl.fma(w0, x0, totals[token])),)
            totals = sums
        values_at += STEP * 4
        index_at += STEP
        x_at += STEP * 4
        chunk += STEP
    row = first_row + tl.arange(0, ROWS)
    for token in tl.static_range(TOKENS):
        y = tl.sum(tl.sum(totals[token], 2), 1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        y_at = (tl.program_id(1) * M + first_token + token).to(tl.int64) * N + row
        rows_stored = tl.where(first_token + token < M, N, 0)
        tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=row < rows_stored)


def launch_gemv_24(x: Tensor, values: Tensor, index: Tensor, *, bias: Tensor | None, config: Gemv) -> Tensor:
    """Launch it. x (M, K), values (N, K/2), index (N, K/8), bias (N,) → (M, N) in x's dtype."""
    M, N, K = len(x), len(values), x.shape[1]
    sums = Sums(x, N, bias=bias, parts=config.parts)
    with on_device(x):
        gemv_24_kernel[(blocks(N, config.rows), config.parts, blocks(M, config.tokens))](
            as_words(x, torch.int64),
            as_words(values, torch.int32),
            as_words(index, torch.int16),
            sums.bias,
            sums.out,
            M,
            N,
            K=K,
            DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
            ROWS=config.rows,
            CHUNKS=config.chunks,
            TOKENS=config.tokens,
            UNROLL=config.unroll,
            PARTS=config.parts,
            HAS_BIAS=sums.has_bias,
            PTX=PTX,
            num_warps=config.warps,
            **OPTIONS,
        )
    return sums.total()
