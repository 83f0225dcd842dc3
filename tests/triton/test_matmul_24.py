"""The 2:4 operation as seen from outside: what it refuses, what it chooses, what tracing sees. No kernel runs here."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmprune.triton_kernels.configs_24 import ExpandDot, Gemv, Mma, Shape24, candidates_24, default_24, parse_24
from llmprune.triton_kernels.decompress_24 import decompress_24
from llmprune.triton_kernels.matmul_24 import matmul_24, matmul_24_torch
from llmprune.triton_kernels.testing.compare import assert_close
from tests.triton.products import bias_for, tokens_for, truth
from tests.triton.weights_24 import random_24

H100 = (9, 0)
BF16 = torch.bfloat16


def test_the_twin_multiplies() -> None:
    weight = random_24(6, 20, dtype=torch.float64)
    x = tokens_for(weight, 3)
    bias = bias_for(weight)
    assert_close(matmul_24_torch(x, weight.values, weight.index, bias=bias), truth(x, weight, bias), max_error=1e-12)


def test_tracing_knows_the_result_without_a_kernel() -> None:
    with FakeTensorMode():
        x, values = torch.empty(2, 3, 64, dtype=BF16), torch.empty(8, 32, dtype=BF16)
        index = torch.empty(8, 8, dtype=torch.uint8)
        y = matmul_24(x, values, index, bias=torch.empty(8, dtype=BF16))
        dense = decompress_24(values, index)
    assert (y.shape, y.dtype) == ((2, 3, 8), BF16)
    assert (dense.shape, dense.dtype) == ((8, 64), BF16)


@pytest.mark.parametrize(
    ("x", "values", "index", "bias", "message"),
    [
        ((2, 60), (8, 32), (8, 8), None, r"x must be \(\.\.\., 64\), torch.bfloat16 .* got \(2, 60\)"),
        ((2, 64), (8, 32), (8, 7), None, r"got values \(8, 32\), index \(8, 7\)"),
        ((2, 64), (8, 31), (8, 8), None, r"got values \(8, 31\), index \(8, 8\)"),
        ((2, 64), (8, 32), (8, 8), (9,), r"bias must be \(8,\), .* got \(9,\)"),
    ],
)
def test_shapes_that_do_not_match_are_refused(
    x: tuple[int, ...], values: tuple[int, ...], index: tuple[int, ...], bias: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        matmul_24(
            torch.zeros(x, dtype=BF16),
            torch.zeros(values, dtype=BF16),
            torch.zeros(index, dtype=torch.uint8),
            bias=None if bias is None else torch.zeros(bias, dtype=BF16),
        )


def test_activations_of_another_dtype_are_refused() -> None:
    weight = random_24(4, 16)
    with pytest.raises(
        ValueError, match=r"x must be \(\.\.\., 16\), torch.bfloat16 on cpu, as the weight; got .* torch.float32"
    ):
        matmul_24(torch.zeros(1, 16), weight.values, weight.index)


def test_a_cpu_is_told_what_to_call_instead() -> None:
    pytest.importorskip("triton")
    weight = random_24(4, 16)
    with pytest.raises(ValueError, match=r"runs on CUDA devices; got tensors on cpu: .* call matmul_24_torch"):
        matmul_24(tokens_for(weight, 1), weight.values, weight.index)


@pytest.mark.parametrize("config", [Mma(warps=16, ordered=True), Gemv(rows=2), ExpandDot(parts=4)], ids=str)
def test_a_config_is_written_as_a_word_and_read_back(config: Mma | Gemv | ExpandDot) -> None:
    assert parse_24(str(config)) == config
    assert parse_24(config.kernel) == type(config)()


@pytest.mark.parametrize("text", ["cublas", "mma:warp=8", "mma:warps=many", ""])
def test_words_that_are_no_config_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"(begins with mma or gemv or expand_dot|whole numbers, named warps).*; got"):
        parse_24(text)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        (Shape24(1, 4096, 4096, BF16, H100), "mma"),
        (Shape24(64, 14336, 4096, torch.float16, H100), "mma"),
        (Shape24(1, 4096, 4096, torch.float16, (7, 5)), "gemv"),
        (Shape24(2, 4100, 4096, BF16, H100), "gemv"),
        (Shape24(2, 4096, 4080, BF16, H100), "gemv"),
        (Shape24(33, 4096, 4080, BF16, H100), "expand_dot"),
    ],
)
def test_the_default_is_the_tensor_cores_where_they_fit(shape: Shape24, kernel: str) -> None:
    assert default_24(shape).kernel == kernel


@pytest.mark.parametrize("shape", [Shape24(1, 64, 4096, torch.float32, H100), Shape24(1, 64, 4100, BF16, H100)])
def test_products_without_a_kernel_are_sent_to_decompress(shape: Shape24) -> None:
    assert candidates_24(shape) == []
    with pytest.raises(ValueError, match=r"no 2:4 kernel fits: .*; expand the weight with decompress_24"):
        default_24(shape)


@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (4096, 14336), (576, 1536), (192, 576)])
@pytest.mark.parametrize("M", [1, 8, 16, 64, 300])
def test_candidates_fit_are_different_and_few(M: int, N: int, K: int) -> None:
    shape = Shape24(M, N, K, BF16, H100)
    found = candidates_24(shape)
    assert found[0] == default_24(shape)
    assert 2 <= len(found) <= 80
    assert len(set(found)) == len(found)
    assert all(config.refusal(shape) is None for config in found)


@pytest.mark.parametrize(("N", "K"), [(50, 400), (256, 256), (512, 256)])
def test_a_small_product_has_its_default_to_time(N: int, K: int) -> None:
    shape = Shape24(1, N, K, BF16, H100)
    assert candidates_24(shape)[0] == default_24(shape)
