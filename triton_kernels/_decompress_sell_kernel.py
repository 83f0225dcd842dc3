"""A SELL weight written out densely: each thread walks along one row and puts its entries where they belong.

The 32 rows of a warp lie far apart in the dense weight, so this writes single entries, into memory that was set to
zero. Several times slower than `decompress_bitmap`; for a weight that is kept in this form only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_sell import load_block, paths, reached
from llmprune.triton_kernels._launch import OPTIONS, PTX, on_device
from llmprune.triton_kernels.configs_sell import default_warps
from llmprune.triton_kernels.pack_sell import LANES, SellWeight

__all__ = ["decompress_sell_kernel", "launch_decompress_sell"]


@triton.jit
def _put(dense_ptr: tl.tensor, bits: tl.tensor, row_ok: tl.tensor) -> None:
    """Write the lower half of `bits`, unless it is 0: what fills up a row must not wipe out its last entry."""
    tl.store(dense_ptr, bits.to(tl.int16), mask=row_ok & ((bits & 0xFFFF) != 0))


@triton.jit
def decompress_sell_kernel(
    words_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slice_blocks_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    dense_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """WARPS of the PARTS of one slice. The weight as in `matmul_sell_kernel`; dense int16 (rows, columns), all 0."""
    slice_ = tl.program_id(0)
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    part = tl.program_id(1) * WARPS + thread // 32
    step, end = tl.load(slice_blocks_ptr + slice_), tl.load(slice_blocks_ptr + slice_ + 1)
    block = step + part
    row = tl.load(row_order_ptr + slice_ * 32 + lane)
    column = tl.load(starts_ptr + (slice_ * PARTS + part) * 32 + lane).to(tl.int32) & 0xFFFF
    dense_ptr += row.to(tl.int64) * columns
    while step < end:
        gaps, values = load_block(words_ptr + block * 160 + lane, block < end)
        to_even, to_odd = paths(gaps)
        for pair in tl.static_range(4):
            _put(dense_ptr + reached(column, to_even, pair, 1, PTX), values[pair], row < rows)
            _put(dense_ptr + reached(column, to_odd, pair, 1, PTX), values[pair] >> 16, row < rows)
        column = reached(column, to_odd, 3, 1, PTX)
        step += PARTS
        block += PARTS


def launch_decompress_sell(weight: SellWeight, out: Tensor) -> None:
    """Fill out (out_features, in_features), contiguous, of the values' dtype."""
    out.zero_()
    slices = len(weight.row_order) // LANES
    warps = default_warps(slices, weight.parts)
    with on_device(out):
        decompress_sell_kernel[(slices, weight.parts // warps)](
            weight.words,
            weight.starts,
            weight.slice_blocks,
            weight.row_order,
            out.view(torch.int16),
            *out.shape,
            PARTS=weight.parts,
            WARPS=warps,
            PTX=PTX,
            num_warps=warps,
            **OPTIONS,
        )
