"""The 2:4 kernels on a GPU: every config that would be timed, against the truth in float64; graphs and compilation."""

from __future__ import annotations

import pytest
import torch

from llmprune.triton_kernels.configs_24 import candidates_24
from llmprune.triton_kernels.decompress_24 import decompress_24
from llmprune.triton_kernels.matmul_24 import matmul_24, shape_24
from llmprune.triton_kernels.pack_24 import meta_24
from llmprune.triton_kernels.testing.compare import assert_close
from tests.triton.products import ROUNDING, bias_for, tokens_for, truth
from tests.triton.weights_24 import Weight24, random_24

pytestmark = pytest.mark.gpu


def on_gpu(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Weight24:
    return Weight24(*(tensor.cuda() for tensor in random_24(rows, columns, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 8, 16, 33, 64, 130])
@pytest.mark.parametrize(("N", "K"), [(512, 2048), (96, 576), (48, 4160), (50, 400)])
def test_every_candidate_is_right_and_repeats_itself(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    weight = on_gpu(N, K, dtype)
    x = tokens_for(weight, M).cuda()
    bias = bias_for(weight).cuda()
    meta = meta_24(weight.index) if N % 16 == 0 and K % 64 == 0 else None
    expected = truth(x, weight, bias)
    candidates = candidates_24(shape_24(x, weight.values))
    assert candidates
    for config in candidates:
        y = matmul_24(x, weight.values, weight.index, meta=meta, bias=bias, config=config)
        again = matmul_24(x, weight.values, weight.index, meta=meta, bias=bias, config=config)
        try:
            assert_close(y, expected, max_error=ROUNDING[dtype])
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from error
        assert torch.equal(y, again), config


def test_single_weights_land_in_their_places() -> None:
    """If this fails, what it prints is the map of lanes: which weight met which input."""
    rows, columns = 32, 128
    dense = torch.zeros(rows, columns, dtype=torch.bfloat16)
    dense[torch.arange(rows), torch.arange(rows) * 37 % columns] = torch.arange(1, rows + 1).bfloat16()
    from llmprune.triton_kernels.pack_24 import pack_24

    values, index = (tensor.cuda() for tensor in pack_24(dense))
    x = torch.eye(columns, dtype=torch.bfloat16).cuda()
    y = matmul_24(x, values, index, config="mma:warps=1,unroll=1")
    assert_close(y.T, dense, max_error=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decompressed_bits_are_those_packed(dtype: torch.dtype) -> None:
    weight = on_gpu(300, 4096, dtype)
    assert torch.equal(decompress_24(weight.values, weight.index).view(torch.int16), weight.dense.view(torch.int16))


def test_a_graph_replays_it() -> None:
    weight = on_gpu(64, 512)
    x = tokens_for(weight, 1).cuda()
    meta = meta_24(weight.index)
    matmul_24(x, weight.values, weight.index, meta=meta)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul_24(x, weight.values, weight.index, meta=meta)
    x.copy_(tokens_for(weight, 1, seed=9))
    graph.replay()
    assert_close(y, truth(x, weight), max_error=ROUNDING[torch.bfloat16])


def test_a_compiled_model_holds_it_in_one_graph() -> None:
    weight = on_gpu(64, 512)
    x = tokens_for(weight, 2).cuda()
    meta = meta_24(weight.index)

    @torch.compile(fullgraph=True)
    def layer(x: torch.Tensor) -> torch.Tensor:
        return matmul_24(x, weight.values, weight.index, meta=meta) * 2

    assert_close(layer(x), 2 * truth(x, weight), max_error=ROUNDING[torch.bfloat16])
