"""A sparse weight of any pattern as SELL-32 with 4-bit column gaps: what the kernel for a few tokens reads.

One thread computes one output. It walks along the kept entries of its row, and learns the column of each by adding the
gap from the one before: 4 bits an entry instead of an index of 16. A gap above 15 is bridged by entries of value 0.

* 32 rows, one for each thread of a warp, make a **slice**. All 32 walk equally far, so a slice is as long as its
  longest row; shorter ones end in zeros. Rows are sorted by length first: masks with the same count in every row
  (Wanda's) then cost no filling at all, and others (SparseGPT's) little. `row_order` says which output each thread
  computes.
* Eight entries of the 32 rows make a **block**: one word of gaps and four words of two values each for every thread,
  stored so that a warp reads 128 bytes at a time.
* One warp alone would walk for long, so the blocks of a slice are dealt out to `parts` warps in runs as equal as can
  be, each with the columns at which it begins (`starts`). Runs lie interleaved: what all warps read in one step is one
  piece.

20 bits a kept entry in bfloat16, and 16 bits for each row of each part. SELL ("sliced ELLPACK") is from Monakov et al.,
"Automatically Tuning Sparse Matrix-Vector Multiplication for GPU Architectures" (2010).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmprune.triton_kernels.configs_sell import default_parts
from llmprune.triton_kernels.pack_bitmap import check_packed, kept_columns

__all__ = ["SellWeight", "pack_sell", "unpack_sell"]

LANES = 32
"""Rows in a slice: the threads of a warp."""

ENTRIES = 8
"""Entries of one row in a block: as many 4-bit gaps as a word holds."""

LARGEST_GAP = 15

WEIGHTS_AT_ONCE = 1 << 22
"""Rows are converted in groups of about so many weights, to bound the memory of their indices, about 50 bytes each."""


@dataclass(frozen=True)
class SellWeight:
    """A sparse weight for `matmul_sell`.

    words : int32 (blocks, 5, 32), five words for each of 32 rows. The first holds gaps: in nibble i the columns from
        entry i - 1 to entry i, 0 at the first of a part. The others hold values: word 1 + j the entries 2 j, in its
        lower half, and 2 j + 1
    starts : int16, read as unsigned, (slices, parts, 32): column of the first entry of each part
    slice_blocks : int32 (slices + 1,): where each slice's blocks begin; its block s · parts + p is step s of part p
    row_order : int32 (slices · 32,): the output that each thread computes; out_features or more: none
    out_features, in_features, dtype : of the weight
    """

    words: Tensor
    starts: Tensor
    slice_blocks: Tensor
    row_order: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    def parts(self) -> int:
        """Warps that share one slice."""
        return self.starts.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def tensors(self) -> list[Tensor]:
        """What an operation of torch takes in its place; `of` turns it back."""
        return [self.words, self.starts, self.slice_blocks, self.row_order]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> SellWeight:
        """The weight with these `tensors`."""
        words, starts, slice_blocks, row_order = tensors
        return cls(words, starts, slice_blocks, row_order, *shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that a product must read of it."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class _Stream:
    """The entries of some rows, one row after another, with zeros where a gap is too large.

    row, step : of each entry: its row in the weight, and how many entries of that row come before
    gap : columns from the entry before; 0 at the first of a row
    column : of each entry
    source : its place in the weight's values; -1 for a zero
    """

    row: Tensor
    step: Tensor
    gap: Tensor
    column: Tensor
    source: Tensor


def pack_sell(values: Tensor, index: Tensor, in_features: int, *, parts: int | None = None) -> SellWeight:
    """Convert the packed form, once when a weight is loaded.

    Parameters
    ----------
    values : kept entries row by row, in 16 bits each (bfloat16, float16), of any shape
    index : uint8 (out_features, in_features / 8 rounded up); bit b of byte k is column 8 k + b
    parts : warps that share one slice, a power of two; None: what fills a large GPU

    Raises
    ------
    ValueError : for another dtype, for parts that are no power of two, or if index and values do not fit each other
    """
    if values.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"matmul_sell takes weights in bfloat16 or float16, got {values.dtype}; use a dense product")
    if parts is not None and (parts < 1 or parts & (parts - 1)):
        raise ValueError(f"parts must be a power of two, got {parts}")
    check_packed(values, index, in_features)
    counts, lengths = _row_lengths(index, in_features)
    if int(counts.sum()) != values.numel():
        raise ValueError(
            f"index must have one bit for each value: got {int(counts.sum())} bits, {values.numel()} values"
        )
    order = lengths.argsort(descending=True, stable=True)
    blocks = -(-lengths[order][::LANES] // ENTRIES)
    slice_blocks = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
    if parts is None:
        parts = default_parts(len(blocks), int(blocks[:1].sum()))
    return _fill(values.reshape(-1), index, in_features, order=order, slice_blocks=slice_blocks, parts=parts)


def _row_groups(index: Tensor, in_features: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time: the first row's number, and the kept columns, bool (rows, in_features)."""
    rows = max(1, WEIGHTS_AT_ONCE // max(1, in_features))
    for first in range(0, index.shape[0], rows):
        yield first, kept_columns(index[first : first + rows], in_features)


def _gaps(kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column, gap from the one before, and zeros needed in between, of each kept entry."""
    row, column = kept.nonzero(as_tuple=True)
    gap = column.diff(prepend=column[:1])
    gap[1:].masked_fill_(row[1:] != row[:-1], 0)
    return row, column, gap, (gap - 1).clamp_(min=0) // LARGEST_GAP


def _row_lengths(index: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Of each row: kept entries, and entries with the zeros that bridge its gaps."""
    counts = torch.zeros(index.shape[0], dtype=torch.int64, device=index.device)
    zeros = torch.zeros_like(counts)
    for first, kept in _row_groups(index, in_features):
        row, _, _, bridges = _gaps(kept)
        counts[first : first + len(kept)] = kept.sum(1)
        zeros.index_add_(0, row + first, bridges)
    return counts, counts + zeros


def _stream(kept: Tensor, first_source: int) -> _Stream:
    """The entries of some rows with the zeros that bridge their gaps.

    kept : bool (rows, in_features)
    first_source : where the values of the first row begin
    """
    row, column, gap, bridges = _gaps(kept)
    place = (bridges + 1).cumsum(0) - 1  # of each kept entry; the zeros before it take the places before
    total = int((bridges + 1).sum())
    gaps = torch.full((total,), LARGEST_GAP, device=kept.device)
    gaps[place] = gap - LARGEST_GAP * bridges
    source = torch.full_like(gaps, -1)
    source[place] = torch.arange(first_source, first_source + len(row), device=kept.device)
    rows = row.repeat_interleave(bridges + 1)
    starts = torch.zeros(len(kept), dtype=torch.int64, device=kept.device).index_add_(0, row, bridges + 1)
    starts = starts.cumsum(0) - starts
    # A sum over all gaps gives columns, if the first of a row goes back from the last of the row before.
    moves = gaps.index_put((place,), column.diff(prepend=column.new_zeros(1)) - LARGEST_GAP * bridges)
    step = torch.arange(total, device=kept.device) - starts[rows]
    return _Stream(row=rows, step=step, gap=gaps, column=moves.cumsum(0), source=source)


def _fill(
    values: Tensor, index: Tensor, in_features: int, *, order: Tensor, slice_blocks: Tensor, parts: int
) -> SellWeight:
    """Write every entry to its place: thread by `order`, block by its step in the row."""
    slices, blocks, rows = len(slice_blocks) - 1, int(slice_blocks[-1]), index.shape[0]
    entries = values.new_zeros(blocks * ENTRIES * LANES)
    nibbles = torch.zeros(blocks * LANES * ENTRIES, dtype=torch.uint8, device=index.device)
    starts = torch.zeros(slices * parts * LANES, dtype=torch.int16, device=index.device)
    thread_of_row = torch.empty_like(order)
    thread_of_row[order] = torch.arange(rows, device=index.device)
    source = 0
    for first, kept in _row_groups(index, in_features):
        stream = _stream(kept, source)
        source += int(kept.sum())
        thread = thread_of_row[stream.row + first]
        block, part, begins = _place(stream.step, slice_blocks, thread // LANES, parts)
        lane, entry = thread % LANES, stream.step % ENTRIES
        nibbles[(block * LANES + lane) * ENTRIES + entry] = stream.gap.masked_fill(begins, 0).to(torch.uint8)
        starts[((thread // LANES * parts + part) * LANES + lane)[begins]] = stream.column[begins].to(torch.int16)
        real = stream.source >= 0
        target = ((block * 4 + entry // 2) * LANES + lane) * 2 + entry % 2
        entries[target[real]] = values[stream.source[real]]
    pairs = nibbles.view(blocks, 1, LANES, ENTRIES // 2, 2)
    gaps = (pairs[..., 0] | pairs[..., 1] << 4).flatten().view(torch.int32)
    return SellWeight(
        words=torch.cat([gaps.view(blocks, 1, LANES), entries.view(torch.int32).view(blocks, 4, LANES)], 1),
        starts=starts.view(slices, parts, LANES),
        slice_blocks=slice_blocks.to(torch.int32),
        row_order=torch.cat([order, torch.arange(rows, slices * LANES, device=order.device)]).to(torch.int32),
        out_features=rows,
        in_features=in_features,
        dtype=values.dtype,
    )


def _place(step: Tensor, slice_blocks: Tensor, slice_: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block and part of each entry, and whether it is the first of its row in that part.

    Of a slice's `count` blocks each part gets count // parts in a run, and the first count % parts of them one more.

    step : which entry of its row
    slice_ : in which slice the row is
    """
    count = slice_blocks.diff()[slice_]
    short, longer = count // parts, count % parts
    run = step // ENTRIES
    late = run - longer * (short + 1)  # from the end of the longer parts
    part = torch.where(late < 0, run // (short + 1), longer + late // short.clamp(min=1))
    within = torch.where(late < 0, run % (short + 1), late % short.clamp(min=1))
    return slice_blocks[slice_] + within * parts + part, part, (within == 0) & (step % ENTRIES == 0)


def unpack_sell(weight: SellWeight) -> Tensor:
    """The dense weight (out_features, in_features): the same bits, where kept entries are those with non-zero bits."""
    shape = (weight.out_features, weight.in_features)
    dense = torch.zeros(shape, dtype=torch.int16, device=weight.words.device)
    bounds = weight.slice_blocks.tolist()
    for slice_, (first, end) in enumerate(pairwise(bounds)):
        row, column, entry = _walk(weight, slice_, first, end)
        real = entry != 0
        dense[row.expand_as(column)[real], column[real]] = entry[real]
    return dense.view(weight.dtype)


def _walk(weight: SellWeight, slice_: int, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the threads of one slice meet: rows (1, 32, 1), columns and value bits (parts, 32, entries)."""
    parts = weight.parts
    steps = -(-(end - first) // parts)
    gaps = weight.words.new_zeros(steps * parts, LANES, ENTRIES)
    gaps[: end - first] = (weight.words[first:end, 0, :, None] >> torch.arange(0, 32, 4, device=gaps.device)) & 15
    entries = gaps.new_zeros(gaps.shape, dtype=torch.int16)
    entries[: end - first] = (
        weight.words[first:end, 1:].transpose(1, 2).contiguous().view(-1).view(torch.int16).view(-1, LANES, ENTRIES)
    )
    gaps, entries = (
        piece.view(steps, parts, LANES, ENTRIES).permute(1, 2, 0, 3).flatten(2) for piece in (gaps, entries)
    )
    columns = gaps.cumsum(-1) + (weight.starts[slice_].long() & 0xFFFF)[..., None]
    rows = weight.row_order[slice_ * LANES : (slice_ + 1) * LANES].long()
    return rows[None, :, None], columns, entries
