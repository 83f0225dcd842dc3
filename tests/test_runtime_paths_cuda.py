"""The ways on a GPU: without one, that each calls its kernel as the kernel wants to be called; with one, the results.

Without a GPU the public operations are replaced by their twins in plain torch, which are called only with arguments
that the operation's own signature takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.runtime import paths_cuda, scratch
from llmprune.runtime.sparse_linear import SparseLinear
from llmprune.runtime.weight import SparseWeight
from llmprune.sparsity.pack import pack
from llmprune.triton_kernels import (
    configs_24,
    configs_bitmap,
    decompress_24,
    decompress_bitmap,
    matmul_24,
    matmul_bitmap,
    matmul_sell,
)
from tests.test_runtime_sparse_linear import sparse_weight

BIAS = torch.linspace(-1, 1, 32)


def packed_weight(pattern: str, *, rows: int = 32, inputs: int = 128) -> tuple[SparseWeight, Tensor]:
    dense = sparse_weight(rows, inputs, pattern=pattern, dtype=torch.bfloat16)
    packed = pack(dense, pattern)
    bias = BIAS[:rows].bfloat16()
    return SparseWeight(packed, bias), dense


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Public operations as their twins; the list tells which were called."""
    called: list[str] = []

    def stand_in(module: Any, compute: Callable[..., Tensor]) -> None:
        name = module.__name__.rpartition(".")[2]
        signature = inspect.signature(getattr(module, name))

        def operation(*arguments: Any, **settings: Any) -> Tensor:
            called.append(name)
            return compute(**signature.bind(*arguments, **settings).arguments)

        monkeypatch.setattr(module, name, operation)

    stand_in(
        matmul_24,
        lambda x, values, index, meta=None, bias=None, config=None: matmul_24.matmul_24_torch(
            x, values, index, bias=bias
        ),
    )
    stand_in(matmul_sell, lambda x, weight, bias=None: matmul_sell.matmul_sell_torch(x, weight, bias=bias))
    stand_in(
        matmul_bitmap, lambda x, weight, bias=None, config=None: matmul_bitmap.matmul_bitmap_torch(x, weight, bias=bias)
    )
    stand_in(decompress_24, lambda values, index, out: out.copy_(decompress_24.decompress_24_torch(values, index)))
    stand_in(decompress_bitmap, lambda weight, out: out.copy_(decompress_bitmap.decompress_bitmap_torch(weight)))
    monkeypatch.setattr(paths_cuda, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return called


@pytest.mark.parametrize("tokens", [1, 4, 64, 512])
@pytest.mark.parametrize("pattern", ["2:4", "any", "4:8"])
def test_every_way_is_called_as_its_kernel_wants(pattern: str, tokens: int, twins: list[str]) -> None:
    weight, dense = packed_weight(pattern if pattern != "4:8" else "2:4")
    weight.pattern = pattern  # 2:4 is 4:8 as well
    x = torch.randn(tokens, 128).bfloat16()
    expected = F.linear(x.double(), dense.double(), weight.bias.double())  # type: ignore[union-attr]
    ways = paths_cuda.paths(weight, tokens)
    for name, make in list(ways.items())[:3]:
        y = make()(x)
        assert float((y.double() - expected).abs().max()) < 0.02 * float(expected.abs().max()), name
    assert set(twins) <= {"matmul_24"} if pattern == "2:4" else set(twins) <= {"matmul_sell", "matmul_bitmap"}
    assert bool(ways) == (pattern == "2:4" or tokens <= 64)
    words = [name for name in ways if ":" in name]
    parse = configs_24.parse_24 if pattern == "2:4" else configs_bitmap.parse_bitmap
    assert all(str(parse(word)) == word for word in words)


@pytest.mark.parametrize(("pattern", "called"), [("2:4", "decompress_24"), ("any", "decompress_bitmap")])
def test_weights_are_expanded_into_the_buffer_that_was_given(pattern: str, called: str, twins: list[str]) -> None:
    weight, dense = packed_weight(pattern)
    out = torch.full(dense.shape, torch.nan, dtype=torch.bfloat16)
    assert paths_cuda.expand(weight, out) is out
    assert torch.equal(out, dense)
    assert twins == [called]


def test_second_forms_are_made_once(twins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.triton_kernels import pack_24

    made: list[int] = []
    monkeypatch.setattr(pack_24, "meta_24", lambda index: made.append(1) or index)
    weight, _ = packed_weight("2:4")
    for tokens in (1, 8, 64):
        paths_cuda.paths(weight, tokens)["kernel"]()
    assert made == [1]


def test_shapes_that_tensor_cores_do_not_take_still_have_a_way(twins: list[str]) -> None:
    weight, _ = packed_weight("2:4", rows=20, inputs=48)
    assert "kernel" in paths_cuda.paths(weight, 1)
    odd, _ = packed_weight("2:4", rows=20, inputs=20)
    assert paths_cuda.paths(odd, 1) == {}


def test_without_triton_there_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths_cuda, "available", lambda: False)
    assert paths_cuda.paths(packed_weight("2:4")[0], 1) == {}


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "any"])
@pytest.mark.parametrize("shape", [(256, 512), (48, 96), (20, 20)])
def test_products_on_a_gpu(shape: tuple[int, int], pattern: str) -> None:
    dense = sparse_weight(*shape, pattern=pattern, dtype=torch.bfloat16)
    module = SparseLinear.from_packed(pack(dense, pattern)).cuda()
    for tokens in (1, 3, 4, 5, 16, 64, 65, 300):
        x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
        expected = F.linear(x.double(), dense.cuda().double())
        error = (module(x).double() - expected).abs().max() / expected.abs().max()
        assert float(error) < 0.02, tokens


@pytest.mark.gpu
def test_every_timed_way_on_a_gpu_is_right() -> None:
    for pattern in ("2:4", "any"):
        dense = sparse_weight(256, 512, pattern=pattern, dtype=torch.bfloat16)
        packed = pack(dense.cuda(), pattern)
        weight = SparseWeight(packed, None)
        for tokens in (1, 16, 64):
            x = torch.randn(tokens, 512, device="cuda").bfloat16()
            expected = F.linear(x.double(), dense.cuda().double())
            for name, make in paths_cuda.paths(weight, tokens).items():
                if name != paths_cuda.CUSPARSELT:
                    error = (make()(x).double() - expected).abs().max() / expected.abs().max()
                    assert float(error) < 0.02, (pattern, tokens, name)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_product_is_recorded_in_a_cuda_graph(tokens: int) -> None:
    module = SparseLinear.from_packed(pack(sparse_weight(256, 512, dtype=torch.bfloat16))).cuda()
    x = torch.randn(tokens, 512, device="cuda").bfloat16()
    with torch.inference_mode():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(torch.randn_like(x))
        scratch.release()  # a graph must not depend on the shared buffer
        graph.replay()
        torch.testing.assert_close(y, module(x))
