"""A bitmap weight written out densely, at the speed of memory: eight columns a thread, 16 bytes of 16-bit entries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_bitmap import dense_tile, load_bytes
from llmprune.triton_kernels._launch import OPTIONS, PTX, blocks, on_device
from llmprune.triton_kernels.pack_bitmap import BitmapWeight

__all__ = ["decompress_bitmap_kernel", "launch_decompress_bitmap"]

ROWS = 8
COLUMNS = 128
"""Of one program of 4 warps: a byte of the mask for each thread."""

SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Entries are moved as whole numbers, so that no bit of them changes."""


@triton.jit
def decompress_bitmap_kernel(
    values_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    row_starts_ptr: tl.tensor,
    dense_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """values (kept,), masks int32 and offsets int16 (N, WORDS), row_starts int32 (N,) → dense (N, K)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    row_ok = (rows < N)[:, None]
    columns = first + tl.arange(0, COLUMNS)
    words = first // 32 + tl.arange(0, COLUMNS // 8) // 4
    word_ok = row_ok & (words < WORDS)[None, :]
    byte, before = load_bytes(masks_ptr, offsets_ptr, rows[:, None] * WORDS + words[None, :], word_ok, COLUMNS, PTX)
    row_values = values_ptr + tl.load(row_starts_ptr + rows, mask=rows < N, other=0)
    dense = dense_tile(row_values[:, None] + before, byte, ROWS, COLUMNS)
    dense_at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(dense_ptr + dense_at, dense, mask=row_ok & (columns < K)[None, :])


def launch_decompress_bitmap(weight: BitmapWeight, out: Tensor) -> None:
    """Fill out (out_features, in_features), contiguous, of the values' dtype."""
    rows, columns = out.shape
    whole = SAME_SIZE[out.element_size()]
    with on_device(out):
        decompress_bitmap_kernel[(blocks(rows, ROWS), blocks(columns, COLUMNS))](
            weight.values.view(whole),
            weight.masks,
            weight.offsets,
            weight.row_starts,
            out.view(whole),
            rows,
            columns,
            WORDS=weight.masks.shape[1],
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            PTX=PTX,
            **OPTIONS,
        )
