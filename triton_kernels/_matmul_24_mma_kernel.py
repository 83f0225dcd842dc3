"""y = x · Wᵀ for a 2:4 weight on sparse tensor cores, for few tokens: Gluon, with `mma.sp` as inline PTX.

`mma.sp.m16n8k32` multiplies 16 rows of a 2:4 matrix, 32 columns wide and stored as 16, with 32 × 8 numbers. The weight
is this matrix and up to eight tokens are its other side (yᵀ = W · xᵀ), so one token wastes nothing that matters: time
goes into reading the weight. Triton has no sparse dot; Gluon lets a kernel say which lane holds what in which register,
which is all that inline PTX needs (PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction").

A warp takes 16 rows and 64 columns a step, in two instructions h = 0, 1. Of lane l = 4g + t the PTX manual asks:

    weight     4 words (2 kept entries each): slots t and t + 4 of eight groups, for rows g and g + 8
    x          4 words (2 inputs each): token g, words t, t + 4, t + 8, t + 12 of 16
    result     4 float32: rows g, g, g + 8, g + 8 and tokens 2t, 2t + 1, 2t, 2t + 1

Which group of the block stands in slot s of instruction h is free, as long as weight, index and x agree. With group
4(s mod 4) + 2h + s div 4, a lane's words of one row are 16 consecutive bytes of the row-major values, so the weight
needs no order of its own. The index words (`pack_24.meta_24`) and x's addresses carry this permutation.

There is no shared memory and no barrier in the loop. The warps of a block deal out the steps among themselves and add
up once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from llmprune.triton_kernels._launch import OPTIONS, aligned, as_words, blocks, on_device
from llmprune.triton_kernels._order_tokens_kernel import order_tokens
from llmprune.triton_kernels._sum_parts_kernel import Sums
from llmprune.triton_kernels.configs_24 import Mma

__all__ = ["launch_mma_24", "mma_24_kernel", "mma_asm"]

CONSTRAINTS = gl.constexpr("=&f,=&f,=&f,=&f," + "r," * 20 + "0,1,2,3")
"""Four results; rows g, rows g + 8, x twice and the index, of four registers each; and what the results begin with."""

NO_GROUP = gl.constexpr(0x44444444)
"""Index words of columns beyond the last: 0 and 1 of each group. Two equal positions would be undefined."""


def mma_asm(dtype: torch.dtype) -> str:
    """Both instructions of a step. $0–3 result, $4–7 row g, $8–11 row g + 8, $12–19 x, $20 index, $24–27 = $0–3."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    name = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"
    return (
        f"{name} {{$0,$1,$2,$3}}, {{$4,$8,$5,$9}}, {{$12,$13,$14,$15}}, {{$24,$25,$26,$27}}, $20, 0x0;\n"
        f"{name} {{$0,$1,$2,$3}}, {{$6,$10,$7,$11}}, {{$16,$17,$18,$19}}, {{$0,$1,$2,$3}}, $20, 0x1;"
    )


@gluon.constexpr_function
def _along(layout: Any, axis: int) -> Any:
    """The layout of a vector that becomes that axis of a tensor of `layout`, once the other axes are inserted."""
    for other in reversed([dim for dim in range(layout.rank) if dim != axis]):
        layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _load_steps(
    values_at: gl.tensor,
    meta_at: gl.tensor,
    x_at: gl.tensor,
    blocks_left: gl.tensor,
    x_stride: gl.tensor,
    K: gl.constexpr,
    STRIDE: gl.constexpr,
    UNROLL: gl.constexpr,
    X_HALF: gl.constexpr,
    EVEN: gl.constexpr,
) -> gl.tuple:
    """Ask for UNROLL steps of a warp, STRIDE blocks apart: for each (rows g, rows g + 8, x, x, index)."""
    loaded: gl.tuple = ()
    for u in gl.static_range(UNROLL):
        v = values_at + u * STRIDE * 16
        m = meta_at + u * STRIDE * 32
        x = x_at + u * x_stride
        if EVEN:
            loaded += ((gl.load(v), gl.load(v + 2 * K), gl.load(x), gl.load(x + X_HALF), gl.load(m)),)
        else:
            ok = blocks_left > u * STRIDE
            upper = gl.load(v, mask=ok, other=0)
            lower = gl.load(v + 2 * K, mask=ok, other=0)
            x0 = gl.load(x, mask=ok, other=0)
            x1 = gl.load(x + X_HALF, mask=ok, other=0)
            loaded += ((upper, lower, x0, x1, gl.load(m, mask=ok, other=NO_GROUP)),)
    return loaded


@gluon.jit
def _multiply_steps(loaded: gl.tuple, total: gl.tensor, ASM: gl.constexpr) -> gl.tensor:
    """total plus what was loaded, step after step."""
    for u in gl.static_range(len(loaded)):
        upper, lower, x0, x1, meta = loaded[u]
        total = gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [upper, lower, x0, x1, meta, total], dtype=gl.float32, is_pure=True, pack=4
        )
    return total


@gluon.jit
def mma_24_kernel(
    x_ptr: gl.tensor,
    values_ptr: gl.tensor,
    meta_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    y_ptr: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    rounds: gl.tensor,
    K: gl.constexpr,
    WARPS: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    UNROLL: gl.constexpr,
    EVEN: gl.constexpr,
    ORDERED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ASM: gl.constexpr,
) -> None:
    """ROW_TILES · 16 outputs of TOKEN_TILES · 8 tokens, over one of `gl.num_programs(1)` shares of the inputs.

    x (M, K/2) int32, or as `order_tokens` leaves it if ORDERED; values (N, K/4) int32; meta (N/16, K/64, 32) int32;
    bias (N,); y (M, N), or (shares, M, N) float32 if there are several; a share is `rounds` times UNROLL steps of all
    warps, together as many blocks of 64 inputs as there are (EVEN) or more.
    All tensors have the axes (warp, row tile, token tile, lane, register), of size 1 where they do not depend on it.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, ROW_TILES, TOKEN_TILES, 1, 4], [1, 1, 1, 32, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    warp = gl.arange(0, WARPS, _along(LAYOUT, 0))[:, None, None, None, None]
    row_tile = gl.arange(0, ROW_TILES, _along(LAYOUT, 1))[None, :, None, None, None]
    token_tile = gl.arange(0, TOKEN_TILES, _along(LAYOUT, 2))[None, None, :, None, None]
    lane = gl.arange(0, 32, _along(LAYOUT, 3))[None, None, None, :, None]
    c = gl.arange(0, 4, _along(LAYOUT, 4))[None, None, None, None, :]
    g = lane // 4
    t = lane % 4

    BLOCKS: gl.constexpr = K // 64
    part = gl.program_id(1)
    block = part * rounds * (UNROLL * WARPS) + warp
    blocks_left = BLOCKS - block
    tile = gl.program_id(0) * ROW_TILES + row_tile
    values_at = values_ptr + (tile * 16 + g) * (K // 4) + block * 16 + t * 4 + c
    meta_at = meta_ptr + (tile * BLOCKS + block) * 32 + lane
    X_HALF: gl.constexpr = 128 if ORDERED else 4
    if ORDERED:
        tiles = gl.num_programs(2) * TOKEN_TILES
        x_at = x_ptr + (block * tiles + gl.program_id(2) * TOKEN_TILES + token_tile) * 256 + lane * 4 + c
        x_stride = tiles * (WARPS * 256)
    else:
        # Lanes without a token of their own read the last one: what they find is not stored.
        token = gl.minimum(gl.program_id(2) * (8 * TOKEN_TILES) + token_tile * 8 + g, M - 1)
        slot = 2 * c + t // 2
        x_at = x_ptr + token * (K // 2) + block * 32 + 2 * (4 * (slot % 4) + slot // 4) + t % 2
        x_stride = WARPS * 32

    total = gl.zeros([WARPS, ROW_TILES, TOKEN_TILES, 32, 4], gl.float32, LAYOUT)
    # A warp stops at the first instruction whose operands have not come. So that many loads are on their way at once,
    # those of a round are asked for in the round before, and the compiler may not put them off.
    loaded = _load_steps(values_at, meta_at, x_at, blocks_left, x_stride, K, WARPS, UNROLL, X_HALF, EVEN)
    for _ in range(1, rounds):
        total = _multiply_steps(loaded, total, ASM)
        values_at += UNROLL * WARPS * 16
        meta_at += UNROLL * WARPS * 32
        x_at += UNROLL * x_stride
        blocks_left -= UNROLL * WARPS
        loaded = _load_steps(values_at, meta_at, x_at, blocks_left, x_stride, K, WARPS, UNROLL, X_HALF, EVEN)
    total = _multiply_steps(loaded, total, ASM)
    _store(gl.sum(total, 0), bias_ptr, y_ptr, M, N, LAYOUT, HAS_BIAS)


@gluon.jit
def _store(
    y: gl.tensor,
    bias_ptr: gl.tensor,
    y_ptr: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    LAYOUT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
) -> None:
    """Write the sums (row tile, token tile, lane, register) of all warps to their rows and tokens."""
    RESULT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    row_tile = gl.arange(0, y.shape[0], _along(RESULT, 0))[:, None, None, None]
    token_tile = gl.arange(0, y.shape[1], _along(RESULT, 1))[None, :, None, None]
    lane = gl.arange(0, 32, _along(RESULT, 2))[None, None, :, None]
    c = gl.arange(0, 4, _along(RESULT, 3))[None, None, None, :]
    row = (gl.program_id(0) * y.shape[0] + row_tile) * 16 + lane // 4 + c // 2 * 8
    token = (gl.program_id(2) * y.shape[1] + token_tile) * 8 + lane % 4 * 2 + c % 2
    if HAS_BIAS:
        y += gl.load(bias_ptr + row).to(gl.float32)
    y_at = (gl.program_id(1) * M + token).to(gl.int64) * N + row
    gl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=token < M)


def launch_mma_24(x: Tensor, values: Tensor, meta: Tensor, *, bias: Tensor | None, config: Mma) -> Tensor:
    """Launch it. x (M, K), values (N, K/2), meta (N/16, K/64, 32), bias (N,) → (M, N) in x's dtype."""
    M, N, K = len(x), len(values), x.shape[1]
    sums = Sums(x, N, bias=bias, parts=config.parts)
    token_blocks = blocks(M, 8 * config.token_tiles)
    words = order_tokens(x, token_blocks * config.token_tiles) if config.ordered else as_words(x, torch.int32)
    share = config.warps * config.unroll * config.parts
    rounds = max(1, blocks(K // 64, share))
    with on_device(x):
        mma_24_kernel[(N // (16 * config.row_tiles), config.parts, token_blocks)](
            words,
            as_words(values, torch.int32),
            aligned(meta),
            sums.bias,
            sums.out,
            M,
            N,
            rounds,
            K=K,
            WARPS=config.warps,
            ROW_TILES=config.row_tiles,
            TOKEN_TILES=config.token_tiles,
            UNROLL=config.unroll,
            EVEN=rounds * share == K // 64,
            ORDERED=config.ordered,
            HAS_BIAS=sums.has_bias,
            ASM=mma_asm(x.dtype),
            num_warps=config.warps,
            **OPTIONS,
        )
    return sums.total()
