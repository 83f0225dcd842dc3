"""SELL weights: every entry comes back whatever the rows' lengths and gaps are, and nothing is stored in vain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.triton_kernels import pack_sell as room
from llmprune.triton_kernels.configs_sell import candidates_sell, default_parts, default_warps
from llmprune.triton_kernels.matmul_sell import matmul_sell, matmul_sell_torch
from llmprune.triton_kernels.pack_sell import SellWeight, pack_sell, unpack_sell
from tests.triton.sparse_weights import bits_of, packed_rows, random_rows, uneven_rows


def pack_rows(dense: Tensor, parts: int | None = None) -> SellWeight:
    case = packed_rows(dense)
    return pack_sell(case.values, case.index, case.in_features, parts=parts)


def nibbles(weight: SellWeight) -> Tensor:
    """The gaps as numbers, (blocks, 32, 8)."""
    return (weight.words[:, 0, :, None] >> torch.arange(0, 32, 4)) & 15


def entries_of(weight: SellWeight) -> Tensor:
    """The bits of the values, (blocks, 32, 8)."""
    return weight.words[:, 1:].transpose(1, 2).contiguous().view(torch.int16)


@given(
    st.integers(0, 70),
    st.integers(0, 400),
    st.floats(0, 1),
    st.sampled_from([1, 2, 4, 16, None]),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=60)
def test_every_entry_comes_back(
    rows: int, in_features: int, density: float, parts: int | None, dtype: torch.dtype
) -> None:
    case = random_rows(rows, in_features, density=density, dtype=dtype, seed=in_features)
    weight = pack_sell(case.values, case.index, in_features, parts=parts)
    assert torch.equal(bits_of(unpack_sell(weight)), bits_of(case.dense))


@pytest.mark.parametrize("parts", [1, 4, 32])
def test_rows_of_every_density_and_minus_zero_come_back(parts: int) -> None:
    case = uneven_rows(75, 333)
    weight = pack_sell(case.values, case.index, 333, parts=parts)
    assert torch.equal(bits_of(unpack_sell(weight)), bits_of(case.dense))


def test_packing_row_group_by_row_group_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = uneven_rows(75, 333)
    whole = pack_sell(case.values, case.index, 333)
    monkeypatch.setattr(room, "WEIGHTS_AT_ONCE", 2000)
    grouped = pack_sell(case.values, case.index, 333)
    assert torch.equal(whole.words, grouped.words)
    assert torch.equal(whole.starts, grouped.starts)


def test_rows_of_one_length_are_stored_without_filling() -> None:
    """Wanda's masks: the same count in each row. 16 bits a value, 4 a gap, and the parts' first columns."""
    kept = torch.rand(64, 1024).argsort(1) < 512
    weight = pack_rows(torch.where(kept, 1.0, 0.0).bfloat16(), parts=4)
    entries = weight.words[:, 1:].numel() * 2
    assert int((entries_of(weight) != 0).sum()) == 64 * 512
    assert entries <= 64 * 512 * 1.02  # some gaps above 15
    assert weight.nbytes == pytest.approx(entries * 2.5 + 64 * 4 * 2, rel=0.01)


def test_blocks_are_dealt_out_evenly_and_none_is_empty() -> None:
    weight = pack_rows(torch.ones(32, 8 * 11, dtype=torch.float16), parts=4)
    assert weight.slice_blocks.tolist() == [0, 11]
    assert weight.starts[0, :, 5].tolist() == [0, 24, 48, 72]  # runs of 3, 3, 3 and 2 blocks


def test_gaps_above_fifteen_are_bridged_by_zeros() -> None:
    dense = torch.zeros(1, 200, dtype=torch.bfloat16)
    dense[0, [100, 115, 131, 162, 192]] = 1.0  # gaps 15, 16, 31, 30
    weight = pack_rows(dense, parts=1)
    assert weight.starts[0, 0, 0] == 100
    assert nibbles(weight)[:, 0].flatten()[:9].tolist() == [0, 15, 15, 1, 15, 15, 1, 15, 15]
    bits = entries_of(weight)[:, 0].flatten()
    assert (bits[:9] != 0).tolist() == [True, True, False, True, False, False, True, False, True]


def test_a_walk_never_leaves_the_inputs() -> None:
    """What fills up a row stays at its last column, so that no activation beyond the end is read."""
    case = uneven_rows(75, 97)
    weight = pack_sell(case.values, case.index, 97, parts=4)
    bounds = weight.slice_blocks.tolist()
    for slice_ in range(len(bounds) - 1):
        _, columns, _ = room._walk(weight, slice_, bounds[slice_], bounds[slice_ + 1])
        assert int(columns.min()) >= 0
        assert int(columns.max()) < 97


def test_longer_rows_come_first_so_that_slices_are_of_like_rows() -> None:
    case = uneven_rows(96, 256)
    weight = pack_sell(case.values, case.index, 256, parts=1)
    counts = (case.dense != 0).sum(1)
    blocks = weight.slice_blocks.diff().tolist()
    assert blocks == sorted(blocks, reverse=True)
    assert sorted(weight.row_order.tolist()) == list(range(96))
    assert counts[weight.row_order[:32].long()].min() >= counts[weight.row_order[64:].long()].max()


def test_columns_beyond_32767_are_read_as_unsigned() -> None:
    dense = torch.zeros(1, 50000, dtype=torch.bfloat16)
    dense[0, 49990:] = 2.0
    weight = pack_rows(dense, parts=1)
    assert torch.equal(unpack_sell(weight), dense)


@pytest.mark.parametrize(("slices", "blocks", "parts"), [(448, 256, 8), (128, 256, 32), (32, 256, 128), (5, 9, 4)])
def test_parts_fill_a_gpu_and_all_have_work(slices: int, blocks: int, parts: int) -> None:
    assert default_parts(slices, blocks) == parts
    warps = default_warps(slices, parts)
    assert parts % warps == 0
    assert warps <= 32
    assert slices * parts // warps >= 100 or warps == 4
    candidates = candidates_sell(slices, blocks)
    assert candidates[0] == (parts, warps)
    assert all(some_parts % some_warps == 0 for some_parts, some_warps in candidates)


def test_other_dtypes_and_forms_are_refused() -> None:
    case = random_rows(4, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"bfloat16 or float16, got torch\.float32"):
        pack_sell(case.values, case.index, 64)
    half = case.values.half()
    with pytest.raises(ValueError, match="one bit for each value"):
        pack_sell(half[1:], case.index, 64)
    with pytest.raises(ValueError, match="parts must be a power of two, got 12"):
        pack_sell(half, case.index, 64, parts=12)
    with pytest.raises(ValueError, match="index must be uint8"):
        pack_sell(half, case.index, 63 - 8)


def test_the_product_refuses_what_it_cannot_do() -> None:
    weight = pack_rows(torch.ones(4, 64, dtype=torch.bfloat16), parts=4)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 64\), .* got \(1, 63\)"):
        matmul_sell(x[:, 1:], weight)
    with pytest.raises(ValueError, match="at most 4 tokens, got 5"):
        matmul_sell(x.expand(5, 64), weight)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu, as the weight; got .*, torch\.float16"):
        matmul_sell(x.half(), weight)
    with pytest.raises(ValueError, match=r"bias must be \(4,\)"):
        matmul_sell(x, weight, bias=x.new_zeros(1))
    with pytest.raises(ValueError, match="power of two that divides"):
        matmul_sell(x, weight, warps=3)


def test_the_twin_is_the_dense_product() -> None:
    case = uneven_rows(40, 77)
    weight = pack_sell(case.values, case.index, 77)
    x, bias = torch.randn(2, 3, 77).bfloat16(), torch.randn(40).bfloat16()
    truth = x.double() @ case.dense.double().T + bias.double()
    assert torch.allclose(matmul_sell_torch(x, weight, bias=bias).double(), truth, rtol=1e-2, atol=1e-2)
