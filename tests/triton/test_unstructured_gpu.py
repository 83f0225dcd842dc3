"""The kernels for unstructured weights on a GPU: every setting that would be timed, against the truth in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from llmprune.triton_kernels.configs_bitmap import candidates_bitmap
from llmprune.triton_kernels.configs_sell import candidates_sell
from llmprune.triton_kernels.decompress_bitmap import decompress_bitmap
from llmprune.triton_kernels.decompress_sell import decompress_sell
from llmprune.triton_kernels.matmul_bitmap import matmul_bitmap
from llmprune.triton_kernels.matmul_sell import matmul_sell
from llmprune.triton_kernels.pack_bitmap import BitmapWeight
from llmprune.triton_kernels.pack_sell import SellWeight
from llmprune.triton_kernels.testing.compare import assert_close
from tests.triton.products import ROUNDING, bias_for, tokens_for, truth
from tests.triton.sparse_weights import PackedRows, bitmap, bits_of, packed_rows, random_rows, sell, uneven_rows

pytestmark = pytest.mark.gpu

Form = TypeVar("Form", SellWeight, BitmapWeight)
CASES = pytest.mark.parametrize(
    ("N", "K", "dtype"), [(512, 2048, torch.bfloat16), (50, 401, torch.float16), (3, 7, torch.bfloat16)], ids=str
)
BOTH = pytest.mark.parametrize("form", ["sell", "bitmap"])


def on_gpu(weight: Form) -> Form:
    held = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{name: part.cuda() for name, part in held.items() if isinstance(part, Tensor)})


def product_of(form: str, case: PackedRows) -> Callable[[Tensor], Tensor]:
    """x → its product with the case, held in one of the two forms."""
    if form == "sell":
        of_sell = on_gpu(sell(case))
        return lambda x: matmul_sell(x, of_sell)
    of_bitmap = on_gpu(bitmap(case))
    return lambda x: matmul_bitmap(x, of_bitmap)


def check_twice(product: Callable[[], Tensor], expected: Tensor, what: object) -> None:
    """It is right, and the same bits again."""
    y = product()
    try:
        assert_close(y, expected, max_error=ROUNDING[y.dtype])
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
    assert torch.equal(y, product()), what


@pytest.mark.parametrize("M", [1, 2, 3, 4])
@CASES
def test_every_way_to_share_sell_is_right_and_repeats_itself(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    case = random_rows(N, K, dtype=dtype)
    x, bias = tokens_for(case, M), bias_for(case)
    expected, x, bias = truth(x, case, bias), x.cuda(), bias.cuda()
    for parts, warps in candidates_sell(-(-N // 32), max(1, K // 16)):
        product = partial(matmul_sell, x, on_gpu(sell(case, parts)), bias=bias, warps=warps)
        check_twice(product, expected, (parts, warps))


@pytest.mark.parametrize("M", [1, 17, 64])
@CASES
def test_every_config_of_bitmap_is_right_and_repeats_itself(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    case = random_rows(N, K, dtype=dtype)
    x, bias = tokens_for(case, M), bias_for(case)
    expected, x, bias = truth(x, case, bias), x.cuda(), bias.cuda()
    weight = on_gpu(bitmap(case))
    for config in candidates_bitmap(M, N, K):
        check_twice(partial(matmul_bitmap, x, weight, bias=bias, config=config), expected, config)


@BOTH
def test_rows_of_every_density_are_multiplied(form: str) -> None:
    case = uneven_rows(75, 333)
    x = tokens_for(case, 3)
    assert_close(product_of(form, case)(x.cuda()), truth(x, case), max_error=ROUNDING[torch.bfloat16])


@BOTH
def test_single_weights_land_in_their_places(form: str) -> None:
    """If this fails, what it prints is the map: which weight met which input."""
    rows, columns = 32, 128
    dense = torch.zeros(rows, columns, dtype=torch.bfloat16)
    dense[torch.arange(rows), torch.arange(rows) * 37 % columns] = torch.arange(1, rows + 1).bfloat16()
    product = product_of(form, packed_rows(dense))
    x = torch.eye(columns, dtype=torch.bfloat16).cuda()
    y = torch.cat([product(some) for some in x.split(4)])
    assert_close(y.T, dense, max_error=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_decompressed_bits_are_those_packed(dtype: torch.dtype) -> None:
    case = uneven_rows(300, 1043, dtype=dtype)
    assert torch.equal(bits_of(decompress_bitmap(on_gpu(bitmap(case)))).cpu(), bits_of(case.dense))
    if dtype.itemsize == 2:
        assert torch.equal(bits_of(decompress_sell(on_gpu(sell(case, 8)))).cpu(), bits_of(case.dense))


@BOTH
def test_a_graph_replays_it(form: str) -> None:
    case = random_rows(64, 512)
    x, product = tokens_for(case, 1).cuda(), product_of(form, case)
    product(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x)
    x.copy_(tokens_for(case, 1, seed=9))
    graph.replay()
    assert_close(y, truth(x.cpu(), case), max_error=ROUNDING[torch.bfloat16])


@BOTH
def test_a_compiled_model_holds_it_in_one_graph(form: str) -> None:
    case = random_rows(64, 512)
    x, product = tokens_for(case, 2), product_of(form, case)

    @torch.compile(fullgraph=True)
    def layer(x: Tensor) -> Tensor:
        return product(x) * 2

    assert_close(layer(x.cuda()), 2 * truth(x, case), max_error=ROUNDING[torch.bfloat16])
