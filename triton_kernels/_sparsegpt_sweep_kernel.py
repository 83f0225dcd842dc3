"""A tile of output rows stays in registers while the sweep goes over all columns of a block.

A column of the tile is picked out by adding up the tile with all other columns zero: that takes as long as the update
of the columns to its right, and needs no way to address registers. The tile is held by few warps (one, for a block of
128 columns), so that no warp waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._launch import OPTIONS, blocks, on_device

__all__ = ["launch_sparsegpt_sweep", "sparsegpt_sweep_kernel", "tile_of"]

TILE = 512
"""Entries that a warp holds: 16 registers of each thread. Four times as many are spilled, with all that goes with
them."""

MOST_WARPS = 16


@triton.jit
def sparsegpt_sweep_kernel(
    columns_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    errors_ptr: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    kept: tl.tensor,
    group: tl.tensor,
    CHOOSE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """columns, keep (uint8), errors (count, rows), factor (count, count); CHOOSE: keep `kept` of `group` columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    places = column[:, None].to(tl.int64) * rows + row[None, :]
    held = (column < count)[:, None] & inside[None, :]
    tile = tl.load(columns_ptr + places, mask=held, other=0.0)
    scale = tl.load(factor_ptr + column.to(tl.int64) * (count + 1), mask=column < count, other=1.0)
    line = row.to(tl.int64)
    for start in range(0, count, group):
        better_ones = tl.zeros([COLUMNS, ROWS], tl.int32)
        if CHOOSE:
            # How many columns of the group are better than each: those of a lower loss, and equal ones before it.
            losses = tl.abs(tile / scale[:, None])
            for other in range(start, start + group):
                loss = tl.sum(tl.where((column == other)[:, None], losses, 0.0), 0)[None, :]
                better = (loss > losses) | ((loss == losses) & (column > other)[:, None])
                better_ones += better.to(tl.int32)
        for j in range(start, start + group):
            here = (column == j)[:, None]
            value = tl.sum(tl.where(here, tile, 0.0), 0)
            if CHOOSE:
                stays = tl.sum(tl.where(here, better_ones, 0), 0) < kept
                tl.store(keep_ptr + line, stays.to(tl.uint8), mask=inside)
            else:
                stays = tl.load(keep_ptr + line, mask=inside, other=1) != 0
            error = tl.where(stays, 0.0, value / tl.sum(tl.where(column == j, scale, 0.0), 0))
            tl.store(errors_ptr + line, error, mask=inside)
            line += rows
            right = (column > j) & (column < count)
            step = tl.load(factor_ptr + j * count + column, mask=right, other=0.0)
            tile = tl.where(here & ~stays[None, :], 0.0, tile - step[:, None] * error[None, :])
    tl.store(columns_ptr + places, tile, mask=held)


def tile_of(count: int) -> dict[str, int]:
    """Columns and rows of a tile, and warps that hold it, for a block of so many columns."""
    columns = int(triton.next_power_of_2(count))
    return {
        "COLUMNS": columns,
        "ROWS": max(1, TILE // columns),
        "num_warps": min(MOST_WARPS, max(1, columns // TILE)),
    }


def launch_sparsegpt_sweep(
    columns: Tensor, keep: Tensor, factor: Tensor, errors: Tensor, *, kept: int, group: int
) -> None:
    """Sweep columns, keep and errors (count, rows) in place; a group of 0 columns: `keep` is given."""
    count, rows = columns.shape
    tile = tile_of(count)
    with on_device(columns):
        sparsegpt_sweep_kernel[(blocks(rows, tile["ROWS"]),)](
            columns,
            keep.view(torch.uint8),
            factor.contiguous(),
            errors,
            rows,
            count,
            kept,
            group or count,
            CHOOSE=group > 0,
            **tile,
            **OPTIONS,
        )
