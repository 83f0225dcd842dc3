"""Activations in the order in which the lanes of a warp want them for `mma.sp` (see `_matmul_24_mma_kernel.py`).

A lane's eight words of one step of 64 inputs stand far apart in x: eight loads of 4 bytes. One token's worth of these
is little beside the weight; with 16 tokens or more it is not, and x is rewritten once, so that two loads of 16 bytes
serve. The order is a permutation of the bits of a word's place:

    x          (8 · tiles tokens, K/64 blocks, c0, t1, h, c1, t0)      a word is two inputs; the last five are bits
    ordered    (K/64 blocks, tiles, h, token of the tile, t1, t0, c1, c0)

where t is a lane's place in its group of four, c its register and h which of the two instructions of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._launch import OPTIONS, as_words, blocks, on_device

__all__ = ["order_tokens", "order_tokens_kernel", "order_tokens_torch"]

BLOCK = 256


def order_tokens_torch(x: Tensor, tiles: int) -> Tensor:
    """What `order_tokens` does, in plain torch.

    Parameters
    ----------
    x : (M, K) of a 16-bit dtype, M ≤ 8 · tiles, K a multiple of 64

    Returns
    -------
    (K/64, tiles, 2, 32, 4) int32; tokens beyond M are zero
    """
    padded = torch.nn.functional.pad(x, (0, 0, 0, 8 * tiles - len(x))).contiguous().view(torch.int32)
    bits = padded.view(tiles, 8, x.shape[1] // 64, 2, 2, 2, 2, 2)
    return bits.permute(2, 0, 5, 1, 4, 7, 6, 3).reshape(x.shape[1] // 64, tiles, 2, 32, 4)


@triton.jit
def order_tokens_kernel(
    x_ptr: tl.tensor, ordered_ptr: tl.tensor, M: tl.tensor, K: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """x (M, K/2) int32 → ordered (K/64, TILES, 2, 32, 4) int32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = at % 4
    lane = at // 4 % 32
    t = lane % 4
    half = at // 128 % 2
    token = at // 256 % TILES * 8 + lane // 4
    block = at // (256 * TILES)
    word = c % 2 * 16 + t // 2 * 8 + half * 4 + c // 2 * 2 + t % 2
    inside = (block < K // 64) & (token < M)
    words = tl.load(x_ptr + token * (K // 2) + block * 32 + word, mask=inside, other=0)
    tl.store(ordered_ptr + at, words, mask=block < K // 64)


def order_tokens(x: Tensor, tiles: int) -> Tensor:
    """x (M, K) of a 16-bit dtype in the lanes' order: (K/64, tiles, 2, 32, 4) int32, tokens beyond M zero."""
    M, K = x.shape
    ordered = torch.empty(K // 64, tiles, 2, 32, 4, dtype=torch.int32, device=x.device)
    with on_device(x):
        order_tokens_kernel[(blocks(ordered.numel(), BLOCK),)](
            as_words(x, torch.int32), ordered, M, K=K, TILES=tiles, BLOCK=BLOCK, **OPTIONS
        )
    return ordered
