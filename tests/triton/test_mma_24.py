"""The sparse-tensor-core kernel, run lane by lane on the CPU: its addresses, its index words, its instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmprune.triton_kernels import _matmul_24_mma_kernel as room
from llmprune.triton_kernels import _sum_parts_kernel
from llmprune.triton_kernels._order_tokens_kernel import order_tokens_torch
from llmprune.triton_kernels.configs_24 import Mma
from llmprune.triton_kernels.pack_24 import meta_24
from llmprune.triton_kernels.testing.compare import assert_close
from llmprune.triton_kernels.testing.emulate_mma_sp import EmulatedKernel, Pointer, mma_sp
from tests.triton.products import ROUNDING, bias_for, tokens_for, truth
from tests.triton.weights_24 import random_24


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch itself is the real one; the kernels that it starts run here, or as their twins."""

    def sum_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        return y.copy_(parts.sum(0) if bias is None else parts.sum(0) + bias)

    monkeypatch.setattr(room, "mma_24_kernel", EmulatedKernel(room.mma_24_kernel))
    monkeypatch.setattr(room, "order_tokens", order_tokens_torch)
    monkeypatch.setattr(_sum_parts_kernel, "sum_parts", sum_parts)


def product(M: int, N: int, K: int, *, dtype: torch.dtype = torch.bfloat16, bias: bool = True, **settings: Any) -> None:
    """Run the kernel and compare with the truth."""
    weight = random_24(N, K, dtype=dtype)
    x = tokens_for(weight, M)
    added = bias_for(weight) if bias else None
    y = room.launch_mma_24(x, weight.values, meta_24(weight.index), bias=added, config=Mma(**settings))
    assert y.dtype == dtype
    assert_close(y, truth(x, weight, added), max_error=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_one_token(dtype: torch.dtype, bias: bool) -> None:
    product(1, 32, 256, dtype=dtype, bias=bias, warps=2, unroll=2)


@pytest.mark.parametrize("ordered", [False, True], ids=["direct", "ordered"])
@pytest.mark.parametrize("M", [3, 8, 13, 16, 21])
def test_tokens_fill_tiles_or_not(M: int, ordered: bool) -> None:
    product(M, 16, 128, warps=2, token_tiles=2, unroll=1, ordered=ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["direct", "ordered"])
@pytest.mark.parametrize("K", [64, 192, 320, 576])
def test_inputs_that_do_not_divide_among_warps(K: int, ordered: bool) -> None:
    product(9, 16, K, warps=2, token_tiles=2, unroll=2, ordered=ordered)


@pytest.mark.parametrize("K", [192, 512])
def test_inputs_shared_by_several_blocks(K: int) -> None:
    product(2, 32, K, warps=2, unroll=1, parts=2)


def test_several_row_tiles() -> None:
    product(8, 64, 128, warps=1, row_tiles=2, unroll=2)


def test_positions_that_do_not_ascend_are_noticed() -> None:
    """The manual leaves them undefined; the emulator must not pass what hardware may not."""
    registers = torch.zeros(32, 4, dtype=torch.int32)
    meta = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(ValueError, match="must ascend"):
        mma_sp(registers, registers, registers.float(), meta, selector=0, dtype=torch.bfloat16)


def test_addresses_outside_a_buffer_are_noticed() -> None:
    with pytest.raises(IndexError, match="address 4 of a buffer of 4"):
        (Pointer(torch.zeros(4)) + torch.arange(5)).places(None)
