"""Reading a SELL block: the words of a warp, and the columns that its gaps lead to.

What limits these kernels is the number of instructions for each entry, so the columns of a block of eight come from a
few operations on whole words. Even and odd nibbles of the gaps go to bytes of two words; their sum, multiplied by
0x01010101, holds in byte k the columns from the block's start to entry 2 k + 1 (at most 8 · 15 = 120, so no byte runs
over), and less the odd gaps those to entry 2 k.

From there to an activation it is one instruction, DP4A: it multiplies a byte by an activation's size and adds it to the
lower half of an address. The upper half never changes, for the launch sees to it that x crosses no multiple of 2³².
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["begin", "load_block", "look", "paths", "reached"]


@triton.jit
def load_block(words_ptr: tl.tensor, inside: tl.tensor) -> tl.tuple:
    """A block's five words for each thread: its gaps, and its eight values in four. All 0 where `inside` is False."""
    gaps = tl.load(words_ptr, mask=inside, other=0)
    word0 = tl.load(words_ptr + 32, mask=inside, other=0)
    word1 = tl.load(words_ptr + 64, mask=inside, other=0)
    word2 = tl.load(words_ptr + 96, mask=inside, other=0)
    word3 = tl.load(words_ptr + 128, mask=inside, other=0)
    return gaps, (word0, word1, word2, word3)


@triton.jit
def paths(gaps: tl.tensor) -> tl.tuple:
    """Columns from a block's start to entries 0, 2, 4, 6 and to entries 1, 3, 5, 7: four bytes each."""
    odd_gaps = (gaps >> 4) & 0x0F0F0F0F
    to_odd = ((gaps & 0x0F0F0F0F) + odd_gaps) * 0x01010101
    return to_odd - odd_gaps, to_odd


@triton.jit
def begin(x_ptr: tl.tensor, column: tl.tensor, BYTES: tl.constexpr, ptx: tl.constexpr) -> tl.tensor:
    """Where a walk over x, BYTES a column, begins: the lower half of an address; a column in portable steps."""
    if ptx:
        return x_ptr.to(tl.int64).to(tl.int32) + column * BYTES
    else:
        return column


@triton.jit
def reached(place: tl.tensor, path: tl.tensor, byte: tl.constexpr, BYTES: tl.constexpr, ptx: tl.constexpr) -> tl.tensor:
    """Where byte `byte` of a path leads to from `place`."""
    if ptx:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [path, BYTES << (8 * byte), place],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return place + ((path >> (8 * byte)) & 0xFF)


@triton.jit
def look(x_ptr: tl.tensor, place: tl.tensor, ptx: tl.constexpr) -> tl.tensor:
    """What stands at a place of x. With PTX the upper half of the address is that of all of x, and costs nothing."""
    if ptx:
        upper = (x_ptr.to(tl.int64) >> 32).to(tl.int32)
        address = tl.inline_asm_elementwise(
            "mov.b64 $0, {$1, $2};", "=l,r,r", [place, upper], dtype=tl.int64, is_pure=True, pack=1
        )
        return tl.load(address.to(tl.pointer_type(x_ptr.dtype.element_ty)))
    else:
        return tl.load(x_ptr + place)
