"""The 2:4 kernels in plain Triton, interpreted: against the truth in float64, with fresh memory full of NaN."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from llmprune.triton_kernels._order_tokens_kernel import order_tokens, order_tokens_torch
from llmprune.triton_kernels._sum_parts_kernel import sum_parts
from llmprune.triton_kernels.configs_24 import ExpandDot, Gemv
from llmprune.triton_kernels.decompress_24 import decompress_24
from llmprune.triton_kernels.matmul_24 import matmul_24
from llmprune.triton_kernels.testing.compare import assert_close
from tests.triton.products import CUTTING, bias_for, tokens_for, truth
from tests.triton.weights_24 import random_24

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (1, 8, 64, Gemv(rows=32, unroll=1)),
        (1, 7, 144, Gemv(rows=64, unroll=2)),
        (3, 5, 80, Gemv(rows=16, tokens=2, unroll=1, warps=1)),
        (4, 16, 48, Gemv(rows=8, tokens=4, unroll=1, warps=1)),
        (2, 6, 208, Gemv(rows=8, tokens=2, unroll=2, parts=2, warps=1)),
        (1, 16, 64, ExpandDot(rows=16, inputs=32)),
        (19, 24, 80, ExpandDot(rows=16, inputs=32)),
        (16, 32, 144, ExpandDot(rows=32, inputs=64, parts=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("bias", "dtype"), [(False, torch.bfloat16), (True, torch.float16)], ids=str)
def test_products(M: int, N: int, K: int, config: Gemv | ExpandDot, bias: bool, dtype: torch.dtype) -> None:
    weight = random_24(N, K, dtype=dtype)
    x = tokens_for(weight, M)
    added = bias_for(weight) if bias else None
    y = matmul_24(x, weight.values, weight.index, bias=added, config=config)
    assert y.dtype == dtype
    assert_close(y, truth(x, weight, added), max_error=CUTTING[dtype])


def test_activations_lie_anywhere_and_have_any_leading_axes() -> None:
    weight = random_24(8, 32)
    whole = tokens_for(weight, 7).repeat(1, 2)
    x = whole[:6, 5:37].view(2, 3, 32).transpose(0, 1)
    y = matmul_24(x, weight.values, weight.index, config=Gemv(rows=16, tokens=2, unroll=1, warps=1))
    assert y.shape == (3, 2, 8)
    assert_close(y, truth(x, weight), max_error=CUTTING[torch.bfloat16])


@pytest.mark.parametrize(("shape", "N"), [((0, 32), 8), ((2, 0, 32), 8), ((3, 32), 0)], ids=str)
def test_nothing_times_something_is_nothing(shape: tuple[int, ...], N: int) -> None:
    weight = random_24(N, 32)
    assert matmul_24(torch.zeros(shape).bfloat16(), weight.values, weight.index).shape == (*shape[:-1], N)


def test_no_inputs_leave_the_bias() -> None:
    weight = random_24(4, 0)
    y = matmul_24(torch.zeros(3, 0).bfloat16(), weight.values, weight.index, bias=bias_for(weight))
    assert torch.equal(y, bias_for(weight).expand(3, 4))


def test_a_vector_gives_a_vector() -> None:
    weight = random_24(4, 32)
    x = tokens_for(weight, 1)
    y = matmul_24(x[0], weight.values, weight.index, config="gemv:rows=2")
    assert_close(y, truth(x, weight)[0], max_error=CUTTING[torch.bfloat16])


@DTYPES
@pytest.mark.parametrize(("N", "K"), [(0, 16), (1, 16), (3, 48), (6, 24), (5, 64)])
def test_decompressed_bits_are_those_packed(N: int, K: int, dtype: torch.dtype) -> None:
    weight = random_24(N, K, dtype=dtype)
    dense = decompress_24(weight.values, weight.index)
    assert torch.equal(dense.view(torch.int16), weight.dense.view(torch.int16))


def test_a_shared_buffer_is_filled() -> None:
    weight = random_24(5, 32)
    scratch = torch.empty(1000, dtype=torch.bfloat16)
    out = scratch[: 5 * 32].view(5, 32)
    assert decompress_24(weight.values, weight.index, out=out) is out
    assert torch.equal(scratch[:160].view(5, 32), weight.dense)
    assert scratch[160:].isnan().all()


@pytest.mark.parametrize(("N", "K", "dtype"), [(3, 20, torch.bfloat16), (3, 24, torch.float16), (2, 8, torch.float32)])
def test_weights_that_no_kernel_takes_are_decompressed_too(N: int, K: int, dtype: torch.dtype) -> None:
    weight = random_24(N, K, dtype=dtype)
    assert torch.equal(decompress_24(weight.values, weight.index), weight.dense)


@pytest.mark.parametrize(("M", "tiles"), [(1, 1), (8, 1), (11, 2), (20, 4)])
def test_tokens_are_brought_into_the_lanes_order(M: int, tiles: int) -> None:
    x = tokens_for(random_24(0, 192), M)
    assert torch.equal(order_tokens(x, tiles), order_tokens_torch(x, tiles))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_parts_are_added_in_order(bias: bool) -> None:
    parts = torch.randn(3, 5, 70)
    added = torch.randn(70).bfloat16() if bias else None
    y = sum_parts(parts, added, torch.empty(5, 70, dtype=torch.float16))
    expected = parts.double().sum(0) + (0 if added is None else added.double())
    assert_close(y, expected, max_error=CUTTING[torch.float16])
