"""y = x · Wᵀ for a SELL weight and 1 to 4 tokens: each thread walks along one row and fetches the activations it meets.

x lies with the tokens of one input side by side, so that one load brings what an entry needs for all of them; it is
small and stays in the L1 cache. The words of two blocks are always on their way. Threads that have walked to their end
add 0 · x at their last column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_24 import unpack_pair
from llmprune.triton_kernels._bits_sell import begin, load_block, look, paths, reached
from llmprune.triton_kernels._launch import OPTIONS, PTX, aligned, on_device
from llmprune.triton_kernels._sum_parts_kernel import Sums
from llmprune.triton_kernels.pack_sell import LANES, SellWeight

__all__ = ["launch_matmul_sell", "matmul_sell_kernel"]


@triton.jit
def _add_entry(
    value: tl.tensor, word: tl.tensor, sums: tl.tuple, TOKENS: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tuple:
    """sums + value · x for up to four tokens, whose activations are in one word."""
    sum0, sum1, sum2, sum3 = sums
    token0, token1 = unpack_pair(word.to(tl.int32), DTYPE)
    sum0 = tl.fma(value, token0, sum0)
    if TOKENS > 1:
        sum1 = tl.fma(value, token1, sum1)
    if TOKENS > 2:
        token2, token3 = unpack_pair((word >> 32).to(tl.int32), DTYPE)
        sum2 = tl.fma(value, token2, sum2)
        if TOKENS > 3:
            sum3 = tl.fma(value, token3, sum3)
    return sum0, sum1, sum2, sum3


@triton.jit
def _add_block(
    block: tl.tuple,
    place: tl.tensor,
    x_ptr: tl.tensor,
    sums: tl.tuple,
    TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tuple:
    """The eight entries of a block: the place in x after them, and the sums with them."""
    gaps, values = block
    BYTES: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    to_even, to_odd = paths(gaps)
    for pair in tl.static_range(4):
        even, odd = unpack_pair(values[pair], DTYPE)
        sums = _add_entry(even, look(x_ptr, reached(place, to_even, pair, BYTES, PTX), PTX), sums, TOKENS, DTYPE)
        sums = _add_entry(odd, look(x_ptr, reached(place, to_odd, pair, BYTES, PTX), PTX), sums, TOKENS, DTYPE)
    return reached(place, to_odd, 3, BYTES, PTX), sums


@triton.jit
def _store_sum(
    out_ptr: tl.tensor, bias_ptr: tl.tensor, row: tl.tensor, sums: tl.tensor, rows: tl.tensor, HAS_BIAS: tl.constexpr
) -> None:
    """Add up what the warps of a program found for one token, and write it to the outputs that the lanes compute."""
    total = tl.sum(tl.reshape(sums, [sums.shape[0] // 32, 32]), 0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def matmul_sell_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slice_blocks_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """WARPS of the PARTS of one slice: 32 outputs, 1 to 4 tokens.

    x (in_features,) int16, int32 or int64: the 1, 2 or 4 tokens of each input (for 3 tokens: 4, the last unused);
    words int32 (blocks, 5, 32), starts int16 (slices, PARTS, 32), slice_blocks (slices + 1,),
    row_order (slices · 32,); out (PARTS / WARPS, TOKENS, rows), float32 if there are several programs for a slice
    """
    slice_, share = tl.program_id(0), tl.program_id(1)
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    part = share * WARPS + thread // 32
    step, end = tl.load(slice_blocks_ptr + slice_), tl.load(slice_blocks_ptr + slice_ + 1)
    block = step + part
    words_ptr += block * 160 + lane
    column = tl.load(starts_ptr + (slice_ * PARTS + part) * 32 + lane).to(tl.int32) & 0xFFFF
    place = begin(x_ptr, column, x_ptr.dtype.element_ty.primitive_bitwidth // 8, PTX)
    zero = tl.zeros([WARPS * 32], tl.float32)
    sums = (zero, zero, zero, zero)
    now = load_block(words_ptr, block < end)
    later = load_block(words_ptr + PARTS * 160, block + PARTS < end)
    while step < end:  # two blocks a turn, each asked for two blocks ahead
        step += 2 * PARTS
        block += 2 * PARTS
        words_ptr += 2 * PARTS * 160
        place, sums = _add_block(now, place, x_ptr, sums, TOKENS, DTYPE, PTX)
        now = load_block(words_ptr, block < end)
        place, sums = _add_block(later, place, x_ptr, sums, TOKENS, DTYPE, PTX)
        later = load_block(words_ptr + PARTS * 160, block + PARTS < end)
    row = tl.load(row_order_ptr + slice_ * 32 + tl.arange(0, 32))
    out_ptr += share * TOKENS * rows
    _store_sum(out_ptr, bias_ptr, row, sums[0], rows, HAS_BIAS)
    if TOKENS > 1:
        _store_sum(out_ptr + rows, bias_ptr, row, sums[1], rows, HAS_BIAS)
    if TOKENS > 2:
        _store_sum(out_ptr + 2 * rows, bias_ptr, row, sums[2], rows, HAS_BIAS)
    if TOKENS > 3:
        _store_sum(out_ptr + 3 * rows, bias_ptr, row, sums[3], rows, HAS_BIAS)


WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}
"""The tokens of one input, as one number."""

SPAN = 1 << 32
"""Addresses of activations have their upper halves in common."""


def _side_by_side(x: Tensor) -> Tensor:
    """x (tokens, in_features) as (in_features,) words of 1, 2 or 4 tokens each; a fourth token to three is zero."""
    tokens, inputs = x.shape
    width = 4 if tokens == 3 else tokens
    if width == 1:
        words = aligned(x)
    else:
        words = x.new_zeros(inputs, width) if tokens < width else x.new_empty(inputs, width)
        words[:, :tokens] = x.t()
    return _in_one_span(words.view(-1).view(WORDS[width]), SPAN)


def _in_one_span(words: Tensor, span: int) -> Tensor:
    """The words, or a copy where no multiple of `span`, at least twice as large as they, lies between their bytes."""
    if _crosses(words, span):
        halves = words.new_empty(2, len(words))
        words = halves[int(_crosses(halves[0], span))].copy_(words)
    return words


def _crosses(words: Tensor, span: int) -> bool:
    first = words.data_ptr()
    return first // span != (first + words.nbytes - 1) // span


def launch_matmul_sell(x: Tensor, weight: SellWeight, *, bias: Tensor | None, warps: int) -> Tensor:
    """Launch it. x (1 to 4 tokens, in_features), bias (out_features,) → (tokens, out_features) in x's dtype.

    warps : of one program; a power of two that divides the weight's parts
    """
    tokens, rows, shares = len(x), weight.out_features, weight.parts // warps
    sums = Sums(x, rows, bias=bias, parts=shares)
    with on_device(x):
        matmul_sell_kernel[(len(weight.row_order) // LANES, shares)](
            _side_by_side(x),
            weight.words,
            weight.starts,
            weight.slice_blocks,
            weight.row_order,
            sums.bias,
            sums.out,
            rows,
            PARTS=weight.parts,
            WARPS=warps,
            TOKENS=tokens,
            DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
            HAS_BIAS=sums.has_bias,
            PTX=PTX,
            num_warps=warps,
            **OPTIONS,
        )
    return sums.total()
