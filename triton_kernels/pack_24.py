"""2:4 weights: how they are stored, and the index words that sparse tensor cores read.

Of every four consecutive inputs two are kept. A weight (N, K) is stored as

    values  (N, K/2)           the two kept entries of each group of four, in the order of their columns
    index   (N, ceil(K/8))     uint8: bit b of byte k of a row says that column 8k + b is kept

so each group of four has half a byte of the index, in which two bits are set. The portable kernels read these bits as
they are. The sparse tensor cores' instruction `mma.sp.m16n8k32` wants a group as its two columns, p0 | p1 << 2, and the
groups of 16 rows spread over a warp:

    meta    (N/16, K/64, 32)   int32: lane l = 4g + t holds, for the groups t, 4+t, 8+t, 12+t of a block of 64 columns,
                               half bytes 0–3 for row g and half bytes 4–7 for row g + 8 of a tile of 16 rows

Those are the groups that lane l needs if the columns of the block take another order, in which 16 consecutive bytes of
values are one lane's share (`_matmul_24_mma_kernel.py`). A sum does not mind the order of its terms, so values stay
row-major as stored, and only the index, a ninth of the bytes, has a second form.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_24", "index_of_meta_24", "meta_24", "pack_24", "positions_24"]

PAIRS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""The columns that a group of four can keep, in the order of their index bits 0b0011 to 0b1100."""


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and index of a weight that already is 2:4.

    An entry is stored if any of its bits is set (−0.0 is); a group with fewer than two of these is filled up with
    zeros at its lowest free columns.

    Parameters
    ----------
    weight : (N, K) of any floating-point dtype, K a multiple of 4

    Returns
    -------
    values (N, K/2) in the weight's dtype, index (N, ceil(K/8)) uint8

    Raises
    ------
    ValueError : if K does not divide into groups, or a group keeps more than two
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(f"a 2:4 weight is (N, K) with K a multiple of 4; got {tuple(weight.shape)}")
    groups = weight.reshape(len(weight), weight.shape[1] // 4, 4)
    kept = _as_integers(groups) != 0
    if crowded := int((kept.sum(-1) > 2).sum()):
        raise ValueError(f"a 2:4 weight keeps at most 2 of every 4 inputs; got more in {crowded} groups")
    # Kept columns sort before free ones, and each kind by its column.
    columns = (torch.arange(4, device=weight.device) + 4 * kept.logical_not()).argsort(-1)[..., :2].sort(-1).values
    bits = (1 << columns).sum(-1).to(torch.uint8)
    return groups.gather(-1, columns).flatten(1), _join_half_bytes(bits)


def _as_integers(tensor: Tensor) -> Tensor:
    """The same bits, as integers."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _join_half_bytes(halves: Tensor) -> Tensor:
    """(N, count) of values below 16 → (N, ceil(count/2)) bytes, the first of each two below."""
    padded = torch.nn.functional.pad(halves, (0, halves.shape[1] % 2))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def _half_bytes(index: Tensor, groups: int) -> Tensor:
    """The index bits of each group: (N, ceil(K/8)) uint8 → (N, K/4) of values below 16."""
    return torch.stack([index & 15, index >> 4], -1).flatten(1)[:, :groups]


def positions_24(index: Tensor, groups: int) -> Tensor:
    """The columns, 0 to 3, of the two kept entries of each group: (N, groups, 2) uint8.

    index : (N, ceil(K/8)) uint8, exactly two bits set in each of the `groups` = K/4 half bytes
    """
    table = torch.zeros(16, 2, dtype=torch.uint8, device=index.device)
    for first, second in PAIRS:
        table[1 << first | 1 << second] = torch.tensor([first, second], dtype=torch.uint8)
    return table[_half_bytes(index, groups).long()]


def meta_24(index: Tensor) -> Tensor:
    """The index as `mma.sp` reads it; made once, when a weight is loaded.

    Parameters
    ----------
    index : (N, K/8) uint8, N a multiple of 16 and K of 64

    Returns
    -------
    (N/16, K/64, 32) int32

    Raises
    ------
    ValueError : if N or K has another divisor
    """
    rows, width = index.shape
    if rows % 16 or width % 8:
        raise ValueError(
            f"index words for sparse tensor cores need N a multiple of 16 and K of 64; got N={rows}, K={8 * width}"
        )
    columns = positions_24(index, 2 * width).int()
    half_bytes = columns[..., 0] | columns[..., 1] << 2
    # Axes (tile, half of the tile, g, block, place in the word, t) → (tile, block, g, t, half, place).
    spread = half_bytes.view(rows // 16, 2, 8, width // 8, 4, 4).permute(0, 3, 2, 5, 1, 4).flatten(-2)
    words = (spread.long() << 4 * torch.arange(8, device=index.device)).sum(-1)
    return words.to(torch.int32).flatten(2)  # bit 31 becomes the sign


def index_of_meta_24(meta: Tensor) -> Tensor:
    """Back from the words of sparse tensor cores (N/16, K/64, 32) int32 to the index (N, K/8) uint8."""
    tiles, blocks, _ = meta.shape
    shifts = 4 * torch.arange(8, device=meta.device)
    spread = ((meta.unsqueeze(-1).long() >> shifts) & 15).view(tiles, blocks, 8, 4, 2, 4)
    half_bytes = spread.permute(0, 4, 2, 1, 5, 3).reshape(16 * tiles, 16 * blocks)
    bits = 1 << (half_bytes & 3) | 1 << (half_bytes >> 2)
    return _join_half_bytes(bits.to(torch.uint8))


def check_24(values: Tensor, index: Tensor) -> None:
    """Refuse values and an index that cannot be a weight together.

    Raises
    ------
    ValueError : if ranks, shapes, dtype or device do not match
    """
    fits = values.ndim == index.ndim == 2 and len(values) == len(index) and values.shape[1] % 2 == 0
    if not fits or index.shape[1] != (values.shape[1] + 3) // 4:
        raise ValueError(
            "a 2:4 weight is values (N, K/2) and index (N, ceil(K/8)); "
            f"got values {tuple(values.shape)}, index {tuple(index.shape)}"
        )
    if index.dtype != torch.uint8 or values.device != index.device:
        raise ValueError(
            f"the index is uint8 on the values' device {values.device}; got {index.dtype} on {index.device}"
        )
