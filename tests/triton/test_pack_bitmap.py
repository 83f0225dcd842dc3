"""Bitmap weights: masks and offsets lead back to every bit, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.triton_kernels.configs_bitmap import BitmapDot, candidates_bitmap, default_bitmap, parse_bitmap
from llmprune.triton_kernels.matmul_bitmap import matmul_bitmap
from llmprune.triton_kernels.pack_bitmap import pack_bitmap, popcount, unpack_bitmap
from tests.triton.sparse_weights import PackedRows, bits_of, packed_rows, random_rows, uneven_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@given(st.integers(0, 9), st.integers(0, 300), st.floats(0, 1), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_every_bit_comes_back(rows: int, in_features: int, density: float, dtype: torch.dtype) -> None:
    case = random_rows(rows, in_features, density=density, dtype=dtype, seed=rows)
    weight = pack_bitmap(case.values, case.index, in_features)
    assert torch.equal(bits_of(unpack_bitmap(weight)), bits_of(case.dense))


def test_rows_of_every_density_and_minus_zero_come_back() -> None:
    case = uneven_rows(40, 77)
    assert (bits_of(case.dense) == -(2**15)).any(), "the case must hold a -0.0"
    weight = pack_bitmap(case.values, case.index, 77)
    assert torch.equal(bits_of(unpack_bitmap(weight)), bits_of(case.dense))


def test_offsets_and_starts_count_what_is_kept_before() -> None:
    case = uneven_rows(33, 2100)
    weight = pack_bitmap(case.values, case.index, 2100)
    kept = bits_of(case.dense) != 0
    for row, word in [(0, 3), (7, 0), (20, 64), (32, 65)]:
        before = int(kept[row, : 32 * word].sum())
        assert int(weight.offsets[row, word]) == before
        assert int(weight.row_starts[row]) == int(kept[:row].sum())


def test_offsets_of_very_long_rows_are_unsigned() -> None:
    case = packed_rows(torch.ones(1, 1 << 16, dtype=torch.float16))
    weight = pack_bitmap(case.values, case.index, 1 << 16)
    assert int(weight.offsets[0, 1536]) & 0xFFFF == 1536 * 32


def test_values_of_n_to_m_may_come_in_rows() -> None:
    dense = torch.randn(6, 8, 4).masked_fill(torch.tensor([True, False, False, True]), 0.0)
    case = packed_rows(dense.view(6, 32))
    weight = pack_bitmap(case.values.view(6, 16), case.index, 32)
    assert torch.equal(unpack_bitmap(weight), case.dense)


def test_half_the_weights_take_the_promised_bits() -> None:
    case = packed_rows(torch.tensor([1.0, 0.0]).repeat(64, 2048).bfloat16())
    weight = pack_bitmap(case.values, case.index, 4096)
    assert weight.nbytes * 8 / case.dense.numel() == pytest.approx(9.5, rel=0.01)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
@settings(deadline=None, max_examples=50)
def test_popcount_counts_bits(words: list[int]) -> None:
    assert popcount(torch.tensor(words, dtype=torch.int32)).tolist() == [
        (word & 0xFFFFFFFF).bit_count() for word in words
    ]


@pytest.mark.parametrize("spoil", ["width", "dtype", "count", "inputs"])
def test_what_does_not_fit_is_refused(spoil: str) -> None:
    case = random_rows(4, 64)
    values, index, in_features = case.values, case.index, 64
    if spoil == "width":
        index = index[:, :-1]
    elif spoil == "dtype":
        index = index.int()
    elif spoil == "count":
        values = values[:-1]
    else:
        in_features = (1 << 16) + 1
        index = torch.zeros(4, 8193, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"index must|in_features must"):
        pack_bitmap(values, index, in_features)


def test_the_product_refuses_what_it_cannot_do() -> None:
    case = random_rows(4, 64)
    weight = pack_bitmap(case.values, case.index, 64)
    x = torch.zeros(5, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 64\), .* got \(5, 63\)"):
        matmul_bitmap(x[:, 1:], weight)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        matmul_bitmap(x.new_zeros(65, 64), weight)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu, as the weight; got .*, torch\.float16"):
        matmul_bitmap(x.half(), weight)
    with pytest.raises(ValueError, match="use decompress_bitmap"):
        matmul_bitmap(x.float(), weight)
    with pytest.raises(ValueError, match=r"bias must be \(4,\)"):
        matmul_bitmap(x, weight, bias=x.new_zeros(5))
    with pytest.raises(ValueError, match="tile must hold all 17"):
        matmul_bitmap(x.new_zeros(17, 64), weight, config="bitmap_dot:tokens=16")


@pytest.mark.parametrize("shape", [(5, 4096, 4096), (64, 14336, 4096), (17, 1024, 4096), (8, 3, 5)])
def test_configs_survive_being_written_and_fit(shape: tuple[int, int, int]) -> None:
    candidates = candidates_bitmap(*shape)
    assert candidates[0] == default_bitmap(*shape)
    assert len(set(candidates)) == len(candidates)
    for config in candidates:
        assert parse_bitmap(str(config)) == config
        assert config.tokens >= max(16, shape[0])


@pytest.mark.parametrize("text", ["sell:rows=1", "bitmap_dot:row=1", "bitmap_dot:rows=x"])
def test_a_config_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"begins with bitmap_dot|whole numbers, named rows"):
        parse_bitmap(text)


def test_what_a_config_does_not_say_has_its_default() -> None:
    assert parse_bitmap("bitmap_dot:rows=32") == BitmapDot(rows=32)


def test_the_shape_is_told_without_running_anything() -> None:
    case: PackedRows = random_rows(12, 64)
    weight = pack_bitmap(case.values.to("meta"), case.index, 64)
    x = torch.zeros(2, 3, 64, dtype=torch.bfloat16, device="meta")
    assert matmul_bitmap(x, weight).shape == (2, 3, 12)
