"""A 2:4 weight written out densely, at the speed of memory.

Rows need not be known: values, index and dense entries all lie row after row without a gap, so the weight is one long
line of chunks of 16 columns: 16 bytes of values and 2 of index in, 32 bytes out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._bits_24 import expand_24
from llmprune.triton_kernels._launch import OPTIONS, PTX, as_words, blocks, on_device

__all__ = ["decompress_24_kernel", "launch_decompress_24"]

CHUNKS = 256
"""Of a block of 4 warps: two a thread."""


@triton.jit
def decompress_24_kernel(
    values_ptr: tl.tensor,
    index_ptr: tl.tensor,
    dense_ptr: tl.tensor,
    count: tl.tensor,
    CHUNKS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """values (count, 4) int32, index (count,) int16 → dense (count, 8) int32, two entries each."""
    chunk = (tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS))[:, None]
    inside = chunk < count
    kept = tl.load(values_ptr + chunk * 4 + tl.arange(0, 4)[None, :], mask=inside, other=0)
    even, odd = expand_24(kept, tl.load(index_ptr + chunk, mask=inside, other=0), PTX)
    words = tl.reshape(tl.join(even, odd), [CHUNKS, 8])
    tl.store(dense_ptr + chunk * 8 + tl.arange(0, 8)[None, :], words, mask=inside)


def launch_decompress_24(values: Tensor, index: Tensor, out: Tensor) -> None:
    """Fill out (N, K) from values (N, K/2), both of a 16-bit dtype, and index (N, K/8); N · K a multiple of 16."""
    count = values.numel() // 8
    with on_device(out):
        decompress_24_kernel[(blocks(count, CHUNKS),)](
            as_words(values, torch.int32),
            # As one line, because the index bytes of a row may be odd in number.
            as_words(index.view(-1), torch.int16),
            out.view(-1).view(torch.int32),
            count,
            CHUNKS=CHUNKS,
            PTX=PTX,
            **OPTIONS,
        )
