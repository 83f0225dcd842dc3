"""Index bits of 2:4 into byte permutations: no comparison, no scattered load.

The instruction PRMT picks any four bytes out of two registers, by a selector of four half bytes (bit 3 of each must
stay 0). The four index bits of a group, 3, 5, 6, 9, 10 or 12, lose no information without their highest one: 3, 5, 6,
1, 2, 4. So 16 index bits & 0x7777 are themselves a selector, and one PRMT looks up a byte for each of four groups in a
table of eight bytes. What is looked up is again half a selector, which then moves the 16-bit entries of a group:

    expand   two kept entries (v0 below, v1 above, in one register) → two registers of two dense entries each
    pick     two registers of two activations each → one register with the two that meet kept entries

Everything is int32, whatever the 16-bit type. `ptx` False does a PRMT in portable steps (interpreter, other GPUs).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expand_24", "halves", "pick_24", "permute_bytes", "unpack_pair"]


def _table(bytes_of: dict[int, int], default: int) -> tuple[tl.constexpr, tl.constexpr]:
    """Eight bytes, one for each code of a group, as two int32."""
    table = bytes(bytes_of.get(code, default) for code in range(8))
    low, high = (int.from_bytes(part, "little", signed=True) for part in (table[:4], table[4:]))
    return tl.constexpr(low), tl.constexpr(high)


_FIRST = {3: 0, 5: 0, 6: 1, 1: 0, 2: 1, 4: 2}
_SECOND = {3: 1, 5: 2, 6: 2, 1: 3, 2: 3, 4: 3}
"""The columns of a group's two kept entries, by its code."""


def _pick_table(columns: dict[int, int]) -> tuple[tl.constexpr, tl.constexpr]:
    """Selectors of the 16-bit entry at a column: bytes 2c and 2c + 1 of eight. Without a code (masked), column 0."""
    return _table({code: 0x10 + 0x22 * column for code, column in columns.items()}, 0x10)


def _expand_table(column: int) -> tuple[tl.constexpr, tl.constexpr]:
    """Selectors of what stands at a dense column: the first kept entry, the second, or zero (bytes 4 and 5)."""
    first = {code: 0x10 for code, at in _FIRST.items() if at == column}
    second = {code: 0x32 for code, at in _SECOND.items() if at == column}
    return _table(first | second, 0x54)


_FIRST_LOW, _FIRST_HIGH = _pick_table(_FIRST)
_SECOND_LOW, _SECOND_HIGH = _pick_table(_SECOND)
_DENSE0_LOW, _DENSE0_HIGH = _expand_table(0)
_DENSE1_LOW, _DENSE1_HIGH = _expand_table(1)
_DENSE2_LOW, _DENSE2_HIGH = _expand_table(2)
_DENSE3_LOW, _DENSE3_HIGH = _expand_table(3)


@triton.jit
def permute_bytes(low: tl.tensor, high: tl.tensor, selector: tl.tensor, ptx: tl.constexpr) -> tl.tensor:
    """PRMT: byte i of the result is the byte of (low, high) that half byte i of the selector names."""
    if ptx:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = selector * 0
        for i in tl.static_range(4):
            byte = (selector >> (4 * i)) & 7
            word = tl.where(byte < 4, low, high)
            result = result | (((word >> ((byte & 3) * 8)) & 0xFF) << (8 * i))
        return result


@triton.jit
def _each_group(lower: tl.tensor, upper: tl.tensor, ptx: tl.constexpr) -> tl.tensor:
    """(…, 1) words of a byte for each of four groups, twice → (…, 4) selectors: byte 0 from `lower`, 1 from `upper`."""
    group = tl.arange(0, 4)
    return permute_bytes(lower, upper, group | ((group + 4) << 4), ptx)


@triton.jit
def expand_24(kept: tl.tensor, bits: tl.tensor, ptx: tl.constexpr) -> tl.tuple:
    """Kept entries back to their places.

    kept (…, 4) int32, a group's two entries each; bits (…, 1) int16, the index of these four groups
    → two (…, 4) int32: dense columns 0 and 1 of each group, columns 2 and 3
    """
    codes = bits.to(tl.int32) & 0x7777
    column0 = permute_bytes(_DENSE0_LOW, _DENSE0_HIGH, codes, ptx)
    column1 = permute_bytes(_DENSE1_LOW, _DENSE1_HIGH, codes, ptx)
    column2 = permute_bytes(_DENSE2_LOW, _DENSE2_HIGH, codes, ptx)
    column3 = permute_bytes(_DENSE3_LOW, _DENSE3_HIGH, codes, ptx)
    even = permute_bytes(kept, 0, _each_group(column0, column1, ptx), ptx)
    odd = permute_bytes(kept, 0, _each_group(column2, column3, ptx), ptx)
    return even, odd


@triton.jit
def pick_24(bits: tl.tensor, ptx: tl.constexpr) -> tl.tensor:
    """Selectors (…, 4) that pick, of a group's four activations in two words, those that meet its kept entries.

    bits (…, 1) int16, the index of four groups
    """
    codes = bits.to(tl.int32) & 0x7777
    first = permute_bytes(_FIRST_LOW, _FIRST_HIGH, codes, ptx)
    second = permute_bytes(_SECOND_LOW, _SECOND_HIGH, codes, ptx)
    return _each_group(first, second, ptx)


@triton.jit
def halves(words: tl.tensor, dtype: tl.constexpr) -> tl.tuple:
    """The two 16-bit floats in a word, the lower half first; bits are moved, not converted."""
    return words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def unpack_pair(words: tl.tensor, dtype: tl.constexpr) -> tl.tuple:
    """Two 16-bit floats in a word (bfloat16 or float16) → two float32 tensors, the lower half's first."""
    if dtype == tl.bfloat16:
        # A bfloat16 is the upper half of a float32.
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    low, high = halves(words, dtype)
    return low.to(tl.float32), high.to(tl.float32)
