"""Packing is exact on bits for every dtype, shape and density, and as small as the format promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.errors import UserError
from llmprune.sparsity import pack as module
from llmprune.sparsity.pack import Packed, as_rows, check, find_pattern, from_rows, pack, row_starts, unpack

DTYPES = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}
FLOATS = list(DTYPES)


def same_bits(one: Tensor, other: Tensor) -> bool:
    assert one.dtype == other.dtype
    return torch.equal(one.view(DTYPES[one.dtype]), other.view(DTYPES[other.dtype]))


def random_bits(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all where something is kept: NaN with payloads, infinities, −0.0, denormals."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(rows, columns)
    drop = torch.rand(rows, columns, generator=generator) >= density
    return raw.masked_fill_(drop, 0)


def sparse_nm(rows: int, columns: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(3))
    mask = scores.argsort(-1).argsort(-1) < n
    return torch.where(mask, scores + 1, 0).flatten(1).to(dtype)


def naive(rows: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Values and index by the words of the format, one entry after another, for "any"."""
    bits = rows.view(DTYPES[rows.dtype]).tolist()
    index = [[0] * math.ceil(rows.shape[1] / 8) for _ in bits]
    for r, row in enumerate(bits):
        for column, entry in enumerate(row):
            if entry:
                index[r][column // 8] |= 1 << column % 8
    kept = [i for i, entry in enumerate(rows.flatten().view(DTYPES[rows.dtype]).tolist()) if entry]
    return rows.flatten()[kept], index


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 41),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**20),
)
def test_any_tensor_comes_back_bit_for_bit(
    rows: int, columns: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    tensor = random_bits(rows, columns, density, dtype, seed)
    packed = pack(tensor)
    values, index = naive(tensor)
    assert same_bits(packed.values, values)
    assert packed.index.tolist() == index
    assert same_bits(unpack(packed), tensor)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 7),
    groups=st.integers(0, 9),
    nm=st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 4), (6, 8), (1, 2), (8, 16), (2, 5), (5, 12)]),
    dtype=st.sampled_from(FLOATS),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_n_of_m_comes_back_with_exactly_n_in_every_group(
    rows: int, groups: int, nm: tuple[int, int], dtype: torch.dtype, share: float, seed: int
) -> None:
    n, m = nm
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, groups, m, generator=generator).argsort(-1)
    dropped = (order >= n) | (torch.rand(rows, groups, 1, generator=generator) > share)  # some groups are dead
    tensor = random_bits(rows, groups * m, 0.9, dtype, seed).masked_fill_(dropped.flatten(1), 0)
    packed = pack(tensor, f"{n}:{m}")
    assert packed.values.shape == (rows, groups * n)
    assert same_bits(unpack(packed), tensor)
    kept = unpack(Packed(torch.ones_like(packed.values, dtype=torch.float32), packed.index, packed.pattern, groups * m))
    assert (kept.unflatten(1, (groups, m)).sum(-1) == n).all() if groups else True


def test_a_group_is_filled_up_at_its_lowest_free_columns() -> None:
    tensor = torch.tensor([[0, 0, 0, 7.0, 0, 0, 0, 0, 0, 5, 0, 6]])
    packed = pack(tensor, "2:4")
    assert packed.index.tolist() == [[0b0011_1001, 0b1010]]
    assert packed.values.tolist() == [[0, 7, 0, 0, 5, 6]]


def test_negative_zero_and_nan_payloads_are_kept() -> None:
    bits = torch.tensor([[-32768, 0, 0x7FC1, 0, 0x7F81, 0, 0, 1]], dtype=torch.int16)
    for pattern in ("any", "2:4"):
        assert torch.equal(unpack(pack(bits.view(torch.bfloat16), pattern)).view(torch.int16), bits)


def test_large_weights_are_packed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_bits(37, 100, 0.4, torch.float16, 0)
    half = sparse_nm(37, 100, 2, 4)
    whole, whole_half = pack(tensor), pack(half, "2:4")
    monkeypatch.setattr(module, "_BLOCK", 300)
    for one, other in ((whole, pack(tensor)), (whole_half, pack(half, "2:4"))):
        assert same_bits(one.values, other.values)
        assert torch.equal(one.index, other.index)
    assert same_bits(unpack(whole), tensor)
    assert same_bits(unpack(whole_half), half)
    assert find_pattern(half, ["2:4"]) == "2:4"


def test_a_transpose_is_packed_as_it_is_seen() -> None:
    tensor = sparse_nm(24, 16, 2, 4).T.contiguous()
    packed = pack(as_rows(tensor, 0), "2:4")
    assert same_bits(from_rows(unpack(packed), tensor.shape, 0), tensor)


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4, 8), 2), ((3, 8, 4), 1), ((8, 3, 4), 0), ((0, 4, 8), 2), ((5, 0), 0)]
)
def test_stacks_become_rows_and_come_back(shape: tuple[int, ...], axis: int) -> None:
    tensor = random_bits(math.prod(shape), 1, 0.5, torch.float32, 0).view(shape)
    rows = as_rows(tensor, axis)
    assert rows.shape == (math.prod(shape[:axis] + shape[axis + 1 :]), shape[axis])
    back = from_rows(unpack(pack(rows)), shape, axis)
    assert back.is_contiguous()
    assert same_bits(back, tensor)


@pytest.mark.parametrize(
    ("pattern", "dtype", "ratio"),
    [
        ("2:4", torch.bfloat16, 0.5625),
        ("any", torch.bfloat16, 0.5625),
        ("4:8", torch.float16, 0.5625),
        ("2:4", torch.float32, 0.53125),
        ("any", torch.float32, 0.53125),
    ],
)
def test_half_of_the_entries_take_what_the_format_promises(pattern: str, dtype: torch.dtype, ratio: float) -> None:
    tensor = sparse_nm(64, 256, 4, 8, dtype) if pattern == "4:8" else sparse_nm(64, 256, 2, 4, dtype)
    assert pack(tensor, pattern).nbytes == ratio * tensor.nbytes


def test_rows_begin_where_row_starts_says() -> None:
    tensor = random_bits(6, 21, 0.5, torch.float32, 1)
    tensor[2] = 0
    packed = pack(tensor)
    starts = row_starts(packed.index).tolist()
    assert starts[0] == 0
    assert starts[2] == starts[3]
    for row, (start, stop) in zip(tensor, pairwise(starts)):
        assert same_bits(packed.values[start:stop], row[row.view(torch.int32) != 0])


def test_unpack_fills_memory_that_it_is_given() -> None:
    tensor = random_bits(5, 19, 0.3, torch.float32, 2)
    out = torch.full_like(tensor, torch.nan)
    assert unpack(pack(tensor), out) is out
    assert same_bits(out, tensor)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("2:4", "more in 1 groups"), ("2:5", "multiple of 5 inputs; got 8"), ("50%", "N:M .2:4. or 'any'; got '50%'")],
)
def test_what_does_not_fit_is_refused(pattern: str, expected: str) -> None:
    tensor = torch.tensor([[1.0, 1, 1, 0, 0, 0, 1, 1]])
    with pytest.raises(UserError, match=expected):
        pack(tensor, pattern)


def test_the_first_pattern_that_fits_is_found() -> None:
    tensor = sparse_nm(4, 16, 4, 8)
    assert find_pattern(tensor, ["2:4", "4:8"]) == "4:8"
    assert find_pattern(sparse_nm(4, 16, 2, 4), ["2:4", "4:8"]) == "2:4"
    assert find_pattern(tensor, ["2:4", "3:5"]) == "any"


def damaged(packed: Packed, **parts: object) -> Packed:
    return Packed(**{**{name: getattr(packed, name) for name in Packed.__dataclass_fields__}, **parts})


@pytest.mark.parametrize("pattern", ["2:4", "any"])
def test_parts_that_do_not_fit_together_are_refused(pattern: str) -> None:
    good = pack(sparse_nm(3, 12, 2, 4), pattern)
    flipped, beyond = good.index.clone(), good.index.clone()
    flipped[1, 0] ^= 1
    beyond[0, 1] |= 0x10
    moved = good.index.clone()  # one entry from the first group to the second: the row's count is right
    moved[0, 0] = 0b0111_0001
    bad = [
        (damaged(good, values=good.values[..., :-1]), "damaged"),
        (damaged(good, index=good.index[:, :1]), "uint8"),
        (damaged(good, index=good.index.to(torch.int32)), "uint8"),
        (damaged(good, index=flipped), "damaged"),
        (damaged(good, index=beyond), "beyond its 12"),
        (damaged(good, in_features=17), "uint8"),
    ]
    if pattern == "2:4":
        bad.append((damaged(good, index=moved), "2 of every 4"))
        bad.append((damaged(good, in_features=11), "damaged"))
    for packed, expected in bad:
        with pytest.raises(UserError, match=expected):
            unpack(packed)
    check(good)
