"""Mask bytes into dense columns: a thread takes eight columns of one row.

It counts the kept columns before its byte: the word's offset, and the bits below the byte. From there it has two ways.
`dense_tile` goes from bit to bit and reads the next value where one is set; it takes entries of any size, and costs
little beside the writing of a dense weight. `dense_tile_16` reads the next eight values as whole words, whichever it
will need, and moves them with byte permutations (see `_bits_24.py`): a third fewer instructions, for the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmprune.triton_kernels._bits_24 import halves, permute_bytes

__all__ = ["dense_tile", "dense_tile_16", "load_bytes"]


def _table(*entries: int) -> tl.constexpr:
    """Four bytes as an int32."""
    return tl.constexpr(int.from_bytes(bytes(entries), "little", signed=True))


# For the two bits of a pair of columns, 0 to 3: which half of a word each column takes (0x10, 0x32), or zero (0x54);
# and how far the values move on, in bits.
_LOWER = _table(0x54, 0x10, 0x54, 0x10)
_UPPER = _table(0x54, 0x54, 0x10, 0x32)
_MOVES = _table(0, 16, 16, 32)


@triton.jit
def _popcount(words: tl.tensor, ptx: tl.constexpr) -> tl.tensor:
    """Bits set in each int32."""
    if ptx:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = words - ((words >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _funnel(low: tl.tensor, high: tl.tensor, shift: tl.tensor, ptx: tl.constexpr) -> tl.tensor:
    """The word that begins at bit `shift`, 0 to 32, of two."""
    if ptx:
        return tl.inline_asm_elementwise(
            "shf.r.clamp.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        both = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        return (both >> shift.to(tl.int64)).to(tl.int32)


@triton.jit
def load_bytes(
    masks_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    COLUMNS: tl.constexpr,
    ptx: tl.constexpr,
) -> tl.tuple:
    """The mask bytes of some rows, and for each how many columns of its row are kept before it.

    at (ROWS, COLUMNS / 8): each byte's word; inside, likewise, whether there is one → two int32 (ROWS, COLUMNS / 8)
    """
    shift = (tl.arange(0, COLUMNS // 8) % 4 * 8)[None, :]
    word = tl.load(masks_ptr + at, mask=inside, other=0)
    before = tl.load(offsets_ptr + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    return (word >> shift) & 0xFF, before + _popcount(word & ((1 << shift) - 1), ptx)


@triton.jit
def _next(values_ptr: tl.tensor, byte: tl.tensor, bit: tl.constexpr) -> tl.tuple:
    """The value at one bit, zero if it is not set, and where the next one is."""
    kept = (byte >> bit) & 1
    return tl.load(values_ptr, mask=kept != 0, other=0), values_ptr + kept


@triton.jit
def dense_tile(values_ptr: tl.tensor, byte: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Dense columns of some rows.

    values_ptr (ROWS, COLUMNS / 8): where the values of each byte begin; byte, likewise, its bits → (ROWS, COLUMNS)
    """
    v0, values_ptr = _next(values_ptr, byte, 0)
    v1, values_ptr = _next(values_ptr, byte, 1)
    v2, values_ptr = _next(values_ptr, byte, 2)
    v3, values_ptr = _next(values_ptr, byte, 3)
    v4, values_ptr = _next(values_ptr, byte, 4)
    v5, values_ptr = _next(values_ptr, byte, 5)
    v6, values_ptr = _next(values_ptr, byte, 6)
    v7, values_ptr = _next(values_ptr, byte, 7)
    return _side_by_side(v0, v1, v2, v3, v4, v5, v6, v7, ROWS, COLUMNS)


@triton.jit
def dense_tile_16(
    words_ptr: tl.tensor,
    at: tl.tensor,
    byte: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ptx: tl.constexpr,
) -> tl.tensor:
    """Dense columns of some rows, for values of 16 bits.

    words_ptr : int32, two values each, of which ten may be read beyond the last
    at (ROWS, COLUMNS / 8): how many values come before those of each byte; byte, likewise, its bits → (ROWS, COLUMNS)
    """
    word0, word1, word2, word3 = _load_eight(words_ptr, at, ptx)
    pairs = (byte & 0x33) | ((byte & 0xCC) << 6)  # the bits of pairs 0, 2, 1, 3, each in a half byte
    lower = permute_bytes(_LOWER, 0, pairs, ptx)
    upper = permute_bytes(_UPPER, 0, pairs, ptx)
    moves = permute_bytes(_MOVES, 0, pairs, ptx)
    move = moves & 0xFF
    v0, v1 = _pair(word0, permute_bytes(lower, upper, 0x40, ptx), DTYPE, ptx)
    v2, v3 = _pair(_funnel(word0, word1, move, ptx), permute_bytes(lower, upper, 0x62, ptx), DTYPE, ptx)
    move += (moves >> 16) & 0xFF
    far = move > 32
    move = tl.where(far, move - 32, move)
    later = tl.where(far, word2, word1)
    first = _funnel(tl.where(far, word1, word0), later, move, ptx)
    second = _funnel(later, tl.where(far, word3, word2), move, ptx)
    v4, v5 = _pair(first, permute_bytes(lower, upper, 0x51, ptx), DTYPE, ptx)
    move = (moves >> 8) & 0xFF
    v6, v7 = _pair(_funnel(first, second, move, ptx), permute_bytes(lower, upper, 0x73, ptx), DTYPE, ptx)
    return _side_by_side(v0, v1, v2, v3, v4, v5, v6, v7, ROWS, COLUMNS)


@triton.jit
def _load_eight(words_ptr: tl.tensor, at: tl.tensor, ptx: tl.constexpr) -> tl.tuple:
    """Eight values from the one numbered `at`, in four words: from five, moved by half a word where `at` is odd."""
    words_ptr += at >> 1
    odd = (at & 1) << 4
    word0, word1, word2 = tl.load(words_ptr), tl.load(words_ptr + 1), tl.load(words_ptr + 2)
    word3, word4 = tl.load(words_ptr + 3), tl.load(words_ptr + 4)
    first, second = _funnel(word0, word1, odd, ptx), _funnel(word1, word2, odd, ptx)
    return first, second, _funnel(word2, word3, odd, ptx), _funnel(word3, word4, odd, ptx)


@triton.jit
def _pair(word: tl.tensor, selector: tl.tensor, DTYPE: tl.constexpr, ptx: tl.constexpr) -> tl.tuple:
    """Two columns, out of the word that begins with the next value."""
    return halves(permute_bytes(word, 0, selector, ptx), DTYPE)


@triton.jit
def _side_by_side(
    v0: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    v3: tl.tensor,
    v4: tl.tensor,
    v5: tl.tensor,
    v6: tl.tensor,
    v7: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Eight (ROWS, COLUMNS / 8) → (ROWS, COLUMNS), in turns."""
    # join adds a last axis, so the innermost pairs are neighbours and the outermost lie four columns apart.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])
