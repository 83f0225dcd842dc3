"""Packing 2:4: what is stored, that nothing is lost, and the words of the sparse tensor cores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.triton_kernels.decompress_24 import decompress_24_torch
from llmprune.triton_kernels.pack_24 import check_24, index_of_meta_24, meta_24, pack_24, positions_24
from tests.triton.weights_24 import random_24

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 9), groups=st.integers(0, 11), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31 - 1))
def test_unpacking_gives_back_every_bit(rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_24(rows, 4 * groups, dtype=dtype, seed=seed)
    assert weight.values.shape == (rows, 2 * groups)
    assert weight.index.shape == (rows, (groups + 1) // 2)
    assert same_bits(decompress_24_torch(weight.values, weight.index), weight.dense)


def test_values_and_bits_stand_in_the_order_of_columns() -> None:
    values, index = pack_24(torch.tensor([[0, 5, 0, 6, 7, 0, 8, 0, 0, 0, 9, 1.0]]))
    assert values.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert index.tolist() == [[0b0101_1010, 0b0000_1100]]
    assert positions_24(index, 3).tolist() == [[[1, 3], [0, 2], [2, 3]]]


def test_groups_that_are_not_full_get_zeros_at_their_lowest_free_columns() -> None:
    values, index = pack_24(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 4.0, 3, 0, 0, 0, -0.0, 0, 0, 0]]))
    assert index.tolist() == [[0b1001_0011, 0b0011_0011]]
    assert values.tolist() == [[0, 0, 0, 4, 3, 0, 0, 0]]
    assert values.signbit().tolist()[0][6:] == [True, False]


def test_three_of_four_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2 of every 4 inputs; got more in 1 groups"):
        pack_24(torch.tensor([[1.0, 1, 1, 0, 0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"K a multiple of 4; got \(2, 6\)"):
        pack_24(torch.zeros(2, 6))


@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (16, 0), (16, 64), (48, 192)])
def test_words_of_tensor_cores_hold_the_index(rows: int, columns: int) -> None:
    index = random_24(rows, columns).index
    meta = meta_24(index)
    assert meta.shape == (rows // 16, columns // 64, 32)
    assert meta.dtype == torch.int32
    assert torch.equal(index_of_meta_24(meta), index)


def test_a_lane_holds_every_fourth_group_of_two_rows() -> None:
    weight = random_24(16, 64)
    columns = positions_24(weight.index, 16)
    lane = 4 * 5 + 3  # g = 5, t = 3
    expected = sum(
        int(columns[row, 4 * i + 3, 0] | columns[row, 4 * i + 3, 1] << 2) << (16 * half + 4 * i)
        for half, row in enumerate((5, 13))
        for i in range(4)
    )
    assert int(meta_24(weight.index)[0, 0, lane]) % 2**32 == expected


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (16, 32), (16, 68)])
def test_words_of_tensor_cores_need_whole_tiles(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match="N a multiple of 16 and K of 64"):
        meta_24(random_24(rows, columns).index)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    weight = random_24(4, 16)
    check_24(weight.values, weight.index)
    with pytest.raises(ValueError, match=r"got values \(4, 8\), index \(4, 1\)"):
        check_24(weight.values, weight.index[:, :1])
    with pytest.raises(ValueError, match=r"got values \(3, 8\), index \(4, 2\)"):
        check_24(weight.values[:3], weight.index)
    with pytest.raises(ValueError, match=r"index is uint8 .* got torch\.int32"):
        check_24(weight.values, weight.index.int())
