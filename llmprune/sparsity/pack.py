"""A sparse weight packed: its kept entries, and a bitmap that says where they stand.

    row      0  5  0  0 | 7  0  0  9      one row of a weight, 2:4 would be kept as 5 0 | 7 9
    values   5  7  9                      the kept entries in the order of their columns
    index    bit b of byte k is set where column 8k + b is kept

For N:M every group keeps exactly n, so that `values` is a matrix (rows, in_features · n / m) and any row can be found
at once; a group with fewer non-zero entries is filled up with zeros at its lowest free columns. Otherwise ("any")
`values` is (kept,), all rows one after another, and `row_starts` tells where each begins.

What is kept is decided on the *bits* of an entry: −0.0 and every NaN come back as they were. The bitmap costs one bit
an entry, so a 16-bit weight at 2:4 or 50 % takes 9/16 of its dense bytes. The layout is described for readers of files
in docs/packed.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.errors import UserError
from llmprune.sparsity.pattern import NM, parse_pattern

__all__ = [
    "ANY",
    "Packed",
    "as_rows",
    "check",
    "find_pattern",
    "from_rows",
    "pack",
    "packed_bytes",
    "row_starts",
    "unpack",
]

ANY = "any"
"""The pattern of a weight whose zeros stand anywhere."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_BLOCK = 2**22
"""Entries that are worked on at a time. What a step needs besides its result stays below 100 MB."""

_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1 in a little-endian 64-bit word, its top byte holds byte i in bit i: byte i is shifted by
56 − 7i, and all other products fall below bit 56 or out of the word, no two on one bit."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight, seen as rows (rows, in_features)."""

    values: Tensor
    """(rows, in_features · n / m) for N:M, (kept,) for "any"; the weight's own dtype."""
    index: Tensor
    """(rows, ⌈in_features / 8⌉), uint8; bits beyond in_features are 0."""
    pattern: str
    """As "2:4", or "any"."""
    in_features: int

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.index.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of values and index."""
        return self.values.nbytes + self.index.nbytes


def pack(rows: Tensor, pattern: str = ANY) -> Packed:
    """Pack a weight.

    Parameters
    ----------
    rows : (rows, in_features), any floating dtype, contiguous or not
    pattern : "any", or N:M such as "2:4"

    Raises
    ------
    UserError
        if a group of m has more than n non-zero entries, or in_features is no multiple of m.
    """
    nm, in_features = _parsed(pattern), rows.shape[1]
    index = torch.empty(rows.shape[0], -(-in_features // 8), dtype=torch.uint8, device=rows.device)
    for block in _blocks(*rows.shape):
        index[block] = _bitmap(_kept(rows[block], nm))
    starts = row_starts(index).tolist()
    values = torch.empty(starts[-1], dtype=rows.dtype, device=rows.device)
    for block in _blocks(*rows.shape):
        chosen = _as_bits(rows[block]).masked_select(_mask(index[block], in_features))
        _as_bits(values)[starts[block.start] : starts[block.stop]] = chosen
    if nm is not None:
        values = values.view(rows.shape[0], in_features // nm.m * nm.n)
    return Packed(values, index, pattern, in_features)


def packed_bytes(rows: int, in_features: int, *, kept: int, element_size: int) -> int:
    """Bytes of values and index of a weight (rows, in_features) of which so many entries are kept."""
    return kept * element_size + rows * -(-in_features // 8)


def unpack(packed: Packed, out: Tensor | None = None) -> Tensor:
    """The weight again, bit for bit.

    Parameters
    ----------
    out : where to put it, (rows, in_features) of the values' dtype; new memory if None

    Raises
    ------
    UserError
        if the index does not fit to the values, see `check`.
    """
    check(packed)
    shape, values = (packed.rows, packed.in_features), _as_bits(packed.values).flatten()
    if out is None:
        out = torch.empty(shape, dtype=packed.values.dtype, device=values.device)
    assert out.shape == shape, (tuple(out.shape), shape)
    assert out.dtype == packed.values.dtype, (out.dtype, packed.values.dtype)
    starts = row_starts(packed.index).tolist()
    for block in _blocks(*shape):
        mask = _mask(packed.index[block], packed.in_features)
        _as_bits(out[block]).zero_().masked_scatter_(mask, values[starts[block.start] : starts[block.stop]])
    return out


def row_starts(index: Tensor) -> Tensor:
    """Where each row's values begin, and where the last one's end.

    Parameters
    ----------
    index : (rows, ⌈in_features / 8⌉), uint8

    Returns
    -------
    (rows + 1,), int64
    """
    counts = _popcount(index).sum(-1, dtype=torch.int64)
    return F.pad(counts.cumsum(0), (1, 0))


def check(packed: Packed) -> None:
    """Make sure that the parts of a packed weight fit together, so that nothing is read beyond its end.

    Raises
    ------
    UserError
        if shapes or counts contradict each other.
    """
    nm, values, index = _parsed(packed.pattern), packed.values, packed.index
    width = -(-packed.in_features // 8)
    if index.dtype != torch.uint8 or index.ndim != 2 or index.shape[1] != width:
        raise UserError(
            f"the index of a packed weight with {packed.in_features} inputs is uint8 (rows, {width}); "
            f"got {index.dtype} {tuple(index.shape)}: the file is damaged."
        )
    if packed.in_features % 8 and bool((index[:, -1] >> packed.in_features % 8).any()):
        raise UserError(f"the index of a packed weight marks columns beyond its {packed.in_features}: it is damaged.")
    if nm is not None:
        _check_groups(packed, nm)
        expected: tuple[int, ...] = (packed.rows, packed.in_features // nm.m * nm.n)
    else:
        expected = (int(row_starts(index)[-1]),)
    if tuple(values.shape) != expected:
        raise UserError(
            f"the index of a packed weight marks values of shape {expected}; got {tuple(values.shape)}: "
            "the file is damaged."
        )


def find_pattern(rows: Tensor, candidates: Iterable[str]) -> str:
    """The first of the N:M `candidates` that the zeros of `rows` (rows, in_features) fit, else "any"."""
    for pattern in candidates:
        nm = _parsed(pattern)
        if nm is None or (nm.fits(rows.shape[1]) and all(_fits(rows[block], nm) for block in _blocks(*rows.shape))):
            return pattern
    return ANY


def as_rows(tensor: Tensor, input_axis: int) -> Tensor:
    """A stored tensor seen as (rows, in_features): the axis over the inputs last, all others as rows."""
    moved = tensor.movedim(input_axis, -1)
    return moved.reshape(moved.shape[:-1].numel(), moved.shape[-1])


def from_rows(rows: Tensor, shape: Iterable[int], input_axis: int) -> Tensor:
    """What `as_rows` made of a tensor of this `shape`, as it was stored, contiguous."""
    sides = list(shape)
    in_features = sides.pop(input_axis)
    return rows.reshape(*sides, in_features).movedim(-1, input_axis).contiguous()


def _parsed(pattern: str) -> NM | None:
    if pattern == ANY:
        return None
    nm = parse_pattern(pattern)
    if not isinstance(nm, NM):
        raise UserError(f"a weight is packed as N:M (2:4) or 'any'; got {pattern!r}.")
    return nm


def _blocks(rows: int, in_features: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, in_features))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: comparisons and copies of floats may treat −0.0 and NaN as they like."""
    return tensor.view(_BITS[tensor.element_size()])


def _kept(rows: Tensor, nm: NM | None) -> Tensor:
    """Which entries are kept: those with a bit set, and the zeros that fill up a group. bool, contiguous."""
    mask = (_as_bits(rows) != 0).contiguous()
    if nm is None:
        return mask
    if not nm.fits(rows.shape[1]):
        raise UserError(f"{nm} needs a multiple of {nm.m} inputs; got {rows.shape[1]}. Pack the weight as 'any'.")
    columns = mask.unflatten(1, (-1, nm.m)).unbind(-1)
    missing = nm.n - _counted(columns)
    if bool((missing < 0).any()):
        raise UserError(
            f"{nm} keeps {nm.n} of every {nm.m}; got a weight with more in {int((missing < 0).sum())} groups. "
            "Pack it as 'any'."
        )
    if bool(missing.any()):
        for column in columns:  # from the lowest; each is a view of the mask
            filled = (missing > 0) & ~column
            column |= filled
            missing -= filled.to(missing.dtype)
    return mask


def _fits(rows: Tensor, nm: NM) -> bool:
    columns = (_as_bits(rows) != 0).unflatten(1, (-1, nm.m)).unbind(-1)
    return not bool((_counted(columns) > nm.n).any())


def _counted(columns: Iterable[Tensor]) -> Tensor:
    """How many of each group are True: whole columns added up, which is faster than a sum within groups."""
    first, *others = columns
    count = first.to(torch.int16)
    for column in others:
        count += column
    return count


def _check_groups(packed: Packed, nm: NM) -> None:
    if not nm.fits(packed.in_features):
        raise UserError(f"a packed weight with {packed.in_features} inputs cannot be {nm}: the file is damaged.")
    for block in _blocks(packed.rows, packed.in_features):
        mask = _mask(packed.index[block], packed.in_features)
        if bool((_counted(mask.unflatten(1, (-1, nm.m)).unbind(-1)) != nm.n).any()):
            raise UserError(f"the index of a packed weight does not keep {nm.n} of every {nm.m}: the file is damaged.")


def _bitmap(mask: Tensor) -> Tensor:
    """(rows, in_features) bool → (rows, ⌈in_features / 8⌉) uint8."""
    whole = F.pad(mask, (0, -mask.shape[1] % 8))
    words = whole.flatten().view(torch.int64) * _GATHER
    return words.bitwise_right_shift_(56).bitwise_and_(255).to(torch.uint8).view(len(whole), whole.shape[1] // 8)


def _mask(index: Tensor, in_features: int) -> Tensor:
    """(rows, ⌈in_features / 8⌉) uint8 → (rows, in_features) bool."""
    words = _spread(index.device).index_select(0, index.flatten().to(torch.int32))
    return words.view(torch.bool).view(len(index), 8 * index.shape[1])[:, :in_features]


@cache
def _spread(device: torch.device) -> Tensor:
    """(256,) int64: the eight bits of every byte as eight bytes of 0 or 1."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return bits.to(torch.uint8).flatten().view(torch.int64).to(device)


def _popcount(index: Tensor) -> Tensor:
    """Bits that are set in every byte: pairs, then fours, then all eight, side by side."""
    pairs = index - (index >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return fours + (fours >> 4) & 0x0F
