"""The kernels for unstructured weights, interpreted: against the truth in float64, with fresh memory full of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from llmprune.triton_kernels._matmul_sell_kernel import _in_one_span
from llmprune.triton_kernels.configs_bitmap import BitmapDot
from llmprune.triton_kernels.decompress_bitmap import decompress_bitmap
from llmprune.triton_kernels.decompress_sell import decompress_sell
from llmprune.triton_kernels.matmul_bitmap import matmul_bitmap
from llmprune.triton_kernels.matmul_sell import matmul_sell
from llmprune.triton_kernels.testing.compare import assert_close
from tests.triton.products import bias_for, tokens_for, truth
from tests.triton.sparse_weights import bitmap, bits_of, packed_rows, random_rows, sell, uneven_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# One rounding of the result (the interpreter cuts bfloat16 off instead) of entries up to five times the mean square.
ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.005}


@pytest.mark.parametrize(("tokens", "dtype"), list(zip([1, 2, 3, 4], 2 * [torch.bfloat16, torch.float16])), ids=str)
def test_sell_multiplies_rows_of_every_density(tokens: int, dtype: torch.dtype) -> None:
    case = uneven_rows(70, 203, dtype=dtype)
    x, bias = tokens_for(case, tokens), bias_for(case) if tokens > 1 else None
    y = matmul_sell(x, sell(case), bias=bias)
    assert y.dtype == dtype
    assert_close(y, truth(x, case, bias), max_error=ROUNDING[dtype])


@pytest.mark.parametrize(("parts", "warps", "tokens"), [(1, 1, 1), (8, 8, 3), (8, 4, 1), (8, 2, 3)])
def test_sell_gives_the_same_however_the_warps_share(parts: int, warps: int, tokens: int) -> None:
    case = random_rows(33, 160, density=0.3)
    x, bias = tokens_for(case, tokens), bias_for(case)
    y = matmul_sell(x, sell(case, parts), bias=bias, warps=warps)
    assert_close(y, truth(x, case, bias), max_error=ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (31, 7), (32, 64), (65, 9)], ids=str)
def test_sell_takes_odd_and_even_shapes(shape: tuple[int, int]) -> None:
    case = random_rows(*shape, density=0.7, dtype=torch.float16)
    x = tokens_for(case, 1)
    assert_close(matmul_sell(x, sell(case)), truth(x, case), max_error=ROUNDING[torch.float16])


def test_sell_reads_columns_beyond_32767() -> None:
    dense = torch.zeros(2, 40000, dtype=torch.bfloat16)
    dense[0, [33000, 33015, 33030]] = torch.tensor([1.0, 2.0, 4.0]).bfloat16()
    dense[1, 39999] = 8
    case = packed_rows(dense)
    x = torch.arange(40000).remainder(7).bfloat16()[None]
    y = matmul_sell(x, sell(case, 1))
    assert y.tolist() == truth(x, case).tolist()


def test_activations_that_cross_a_span_of_addresses_are_copied_to_where_none_is_crossed() -> None:
    """The upper half of an address is computed once for all of x."""
    words = torch.arange(1000, dtype=torch.int16)
    for start in range(0, 800, 50):
        some = words[start : start + 100]
        moved = _in_one_span(some, 512)
        assert moved.data_ptr() // 512 == (moved.data_ptr() + 199) // 512
        assert torch.equal(moved, some)


@pytest.mark.parametrize(("rows", "in_features", "tokens"), [(0, 64, 1), (5, 0, 2), (5, 64, 0), (40, 64, 3)], ids=str)
def test_nothing_kept_leaves_the_bias(rows: int, in_features: int, tokens: int) -> None:
    case = packed_rows(torch.zeros(rows, in_features, dtype=torch.bfloat16))
    x, bias = tokens_for(case, tokens), bias_for(case)
    for y in (matmul_sell(x, sell(case), bias=bias), matmul_bitmap(x, bitmap(case), bias=bias)):
        assert torch.equal(y, bias.expand(tokens, rows))
    assert not decompress_sell(sell(case)).any()
    assert not decompress_bitmap(bitmap(case)).any()


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, torch.float16), (1, torch.bfloat16), (17, torch.bfloat16), (64, torch.float16)], ids=str
)
def test_bitmap_multiplies_rows_of_every_density(tokens: int, dtype: torch.dtype) -> None:
    case = uneven_rows(40, 203, dtype=dtype)
    x, bias = tokens_for(case, tokens), bias_for(case) if tokens > 1 else None
    y = matmul_bitmap(x, bitmap(case), bias=bias)
    assert y.dtype == dtype
    assert_close(y, truth(x, case, bias), max_error=ROUNDING[dtype])


@pytest.mark.parametrize(
    "config", [BitmapDot(rows=16, inputs=32), BitmapDot(rows=32, inputs=64, parts=3), BitmapDot(parts=2)], ids=str
)
def test_bitmap_gives_the_same_with_every_config(config: BitmapDot) -> None:
    case = random_rows(17, 136, density=0.4)
    x, bias = tokens_for(case, 7), bias_for(case)
    y = matmul_bitmap(x, bitmap(case), bias=bias, config=config)
    assert_close(y, truth(x, case, bias), max_error=ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("shape", [(1, 1), (17, 7), (64, 128), (3, 129)], ids=str)
def test_bitmap_takes_odd_and_even_shapes(shape: tuple[int, int]) -> None:
    case = random_rows(*shape, density=0.7, dtype=torch.float16)
    x = tokens_for(case, 6)
    assert_close(matmul_bitmap(x, bitmap(case)), truth(x, case), max_error=ROUNDING[torch.float16])


def test_activations_lie_anywhere_and_have_any_leading_axes() -> None:
    case = random_rows(20, 64)
    x = tokens_for(case, 4).repeat(1, 2)[:, 5:69].view(2, 2, 64).transpose(0, 1)
    for y in (matmul_sell(x, sell(case)), matmul_bitmap(x, bitmap(case))):
        assert y.shape == (2, 2, 20)
        assert_close(y, truth(x, case), max_error=ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_bitmap_decompresses_to_the_same_bits(dtype: torch.dtype) -> None:
    for case in (uneven_rows(21, 203, dtype=dtype), random_rows(8, 256, dtype=dtype)):
        assert torch.equal(bits_of(decompress_bitmap(bitmap(case))), bits_of(case.dense))


@DTYPES
def test_sell_decompresses_to_the_same_bits(dtype: torch.dtype) -> None:
    case = uneven_rows(70, 203, dtype=dtype)
    assert torch.equal(bits_of(decompress_sell(sell(case, 8))), bits_of(case.dense))


def test_a_shared_buffer_is_filled() -> None:
    case = random_rows(9, 40)
    scratch = torch.empty(500, dtype=torch.bfloat16)
    out = scratch[:360].view(9, 40)
    for decompressed in (decompress_bitmap(bitmap(case), out=out), decompress_sell(sell(case), out=out.fill_(7))):
        assert decompressed is out
        assert torch.equal(out, case.dense)
    assert scratch[360:].isnan().all()


def test_a_buffer_that_does_not_fit_is_refused() -> None:
    case = random_rows(9, 40)
    for out in (torch.empty(9, 41).bfloat16(), torch.empty(9, 40), torch.empty(40, 9).bfloat16().t()):
        with pytest.raises(ValueError, match=r"out must be contiguous, \(9, 40\)"):
            decompress_bitmap(bitmap(case), out=out)
        with pytest.raises(ValueError, match=r"out must be contiguous, \(9, 40\)"):
            decompress_sell(sell(case), out=out)


def test_the_operations_keep_their_promises_to_torch() -> None:
    """Nothing is changed that the schema does not say, and tracing sees the same shapes as running."""
    case = random_rows(20, 64)
    x, bias = tokens_for(case, 2), bias_for(case)
    s, b = sell(case), bitmap(case)
    config = str(BitmapDot(rows=32, inputs=64))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (torch.ops.llmprune.matmul_sell, (x, s.tensors, bias), {"out_features": 20, "warps": 4}),
        (torch.ops.llmprune.matmul_bitmap, (x, b.tensors, None), {"config": config}),
        (torch.ops.llmprune.decompress_sell, (s.tensors, torch.zeros_like(case.dense)), {}),
        (torch.ops.llmprune.decompress_bitmap, (b.tensors, torch.zeros_like(case.dense)), {}),
    ]
    for operation, arguments, settings in calls:
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operation.default, arguments, settings, test_utils=checks)
