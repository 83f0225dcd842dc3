"""What the kernels cost before memory does, without a GPU: compiled for one, and instructions counted.

Each number is what was counted when the kernel was last changed; a tenth more is a regression. Instructions are those
of the main loop, per thread and dense weight position. An H100 can issue about 11 of these in the time in which it
reads a 2:4 weight.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from llmprune.triton_kernels._decompress_24_kernel import decompress_24_kernel
from llmprune.triton_kernels._matmul_24_expand_dot_kernel import expand_dot_24_kernel
from llmprune.triton_kernels._matmul_24_gemv_kernel import gemv_24_kernel
from llmprune.triton_kernels._matmul_24_mma_kernel import mma_24_kernel, mma_asm
from llmprune.triton_kernels.configs_24 import ExpandDot, Gemv, Mma
from llmprune.triton_kernels.testing.aot import Assembly, compile_kernel
from tests.triton.launched import SLACK, constants

NEWEST = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
OTHER_GPUS = (86, 89, 100, 120) if NEWEST else (86, 89)
BF16 = torch.bfloat16


def mma(config: Mma, capability: int, *, dtype: torch.dtype = BF16) -> Assembly:
    """The sparse-tensor-core kernel as it is launched for 16-divisible N."""
    word = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    signature = {"x_ptr": "*i32", "values_ptr": "*i32", "meta_ptr": "*i32", "bias_ptr": word, "y_ptr": word}
    return compile_kernel(
        mma_24_kernel,
        {**signature, "M": "i32", "N": "i32", "rounds": "i32"},
        constants(mma_24_kernel, config, K=4096, EVEN=True, ASM=mma_asm(dtype)),
        capability=capability,
        warps=config.warps,
        aligned=[*signature, "N"],
    )


def gemv(config: Gemv, capability: int, *, K: int = 4096, dtype: torch.dtype = BF16) -> Assembly:
    """The kernel without tensor cores."""
    word = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    signature = {"x_ptr": "*i64", "values_ptr": "*i32", "index_ptr": "*i16", "bias_ptr": word, "y_ptr": word}
    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    return compile_kernel(
        gemv_24_kernel,
        {**signature, "M": "i32", "N": "i32"},
        constants(gemv_24_kernel, config, K=K, DTYPE=kind, CHUNKS=config.chunks),
        capability=capability,
        warps=config.warps,
        aligned=[*signature, "N"],
    )


def expand_dot(config: ExpandDot, capability: int) -> Assembly:
    """The kernel on dense tensor cores."""
    signature = {"x_ptr": "*bf16", "values_ptr": "*i32", "index_ptr": "*i16", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    return compile_kernel(
        expand_dot_24_kernel,
        {**signature, "M": "i32", "N": "i32"},
        constants(expand_dot_24_kernel, config, K=4096),
        capability=capability,
        warps=config.warps,
        stages=config.stages,
        aligned=[*signature, "N"],
    )


def decompress(capability: int) -> Assembly:
    """The kernel that writes a dense weight; it has no loop."""
    signature = {"values_ptr": "*i32", "index_ptr": "*i16", "dense_ptr": "*i32", "count": "i32"}
    return compile_kernel(decompress_24_kernel, signature, {"CHUNKS": 256, "PTX": True}, capability=capability)


def within(assembly: Assembly, *, weights: float, budget: float, blocks: int = 1) -> None:
    """No spill; instructions per weight within the budget; `blocks` blocks of threads fit a multiprocessor."""
    assert assembly.spilled_bytes == 0
    assert len(assembly.loop) / weights <= budget * SLACK, f"{len(assembly.loop) / weights:.2f} instructions per weight"
    assert assembly.registers * 32 * assembly.warps * blocks <= 65536


def check_mma(config: Mma, assembly: Assembly, *, budget: float, blocks: int = 1) -> None:
    """Two `mma.sp` a step, tile of rows and tile of tokens; two wide loads of values; no barrier."""
    multiplied = assembly.count("HMMA.SP.16832.F32")
    steps = multiplied // (2 * config.row_tiles * config.token_tiles)  # as often as the compiler unrolled the loop
    assert multiplied == 2 * steps * config.row_tiles * config.token_tiles > 0
    wide = steps * 2 * (config.row_tiles + (config.token_tiles if config.ordered else 0))
    assert assembly.count("LDG.128") == wide
    assert assembly.count("BAR") == 0
    within(assembly, weights=steps * config.row_tiles * 16 * 64 / 32, budget=budget, blocks=blocks)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("config", "budget", "blocks"),
    [
        (Mma(warps=16, unroll=2), 0.86, 2),
        (Mma(warps=8, unroll=4), 0.75, 2),
        (Mma(warps=8, row_tiles=2, unroll=2), 0.69, 2),
        (Mma(warps=8, token_tiles=2, unroll=2, ordered=True), 0.99, 2),
        (Mma(warps=8, token_tiles=8, unroll=1, ordered=True), 2.9, 1),
    ],
    ids=str,
)
def test_sparse_tensor_cores(config: Mma, budget: float, blocks: int, capability: int) -> None:
    check_mma(config, mma(config, capability), budget=budget, blocks=blocks)


@pytest.mark.parametrize("capability", OTHER_GPUS)
def test_sparse_tensor_cores_of_other_gpus(capability: int) -> None:
    check_mma(Mma(warps=8, unroll=2), mma(Mma(warps=8, unroll=2), capability), budget=0.9)


def test_sparse_tensor_cores_with_float16() -> None:
    config = Mma(warps=8, unroll=2)
    assembly = mma(config, 90, dtype=torch.float16)
    assert assembly.count("HMMA.SP.BF16") == 0
    check_mma(config, assembly, budget=0.86)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "budget"), [(1, 2.85), (4, 7.1)])
def test_without_tensor_cores(tokens: int, budget: float, capability: int) -> None:
    assembly = gemv(Gemv(tokens=tokens), capability, K=16 * 64 * 4 * 14)
    chunks = assembly.count("LDG.U16")
    assert assembly.count("LDG.128") == chunks * (1 + 2 * tokens)
    assert assembly.count("FFMA") == chunks * 8 * tokens
    assert assembly.count("BAR") == 0
    within(assembly, weights=16 * chunks, budget=budget, blocks=4)


@pytest.mark.parametrize(("capability", "multiply"), [(80, "HMMA"), (90, "HGMMA")])
def test_dense_tensor_cores(capability: int, multiply: str) -> None:
    config = ExpandDot()
    assembly = expand_dot(config, capability)
    assert assembly.count(multiply) > 0
    assert assembly.count("LDGSTS.128") > 0
    within(assembly, weights=config.rows * config.inputs / 128, budget=5.1, blocks=2)


@pytest.mark.parametrize("capability", [80, 90])
def test_decompression(capability: int) -> None:
    """It has no loop. A weight takes 3.1 bytes of traffic, in which an H100 can issue about 30 instructions."""
    assembly = decompress(capability)
    assert (assembly.count("LDG.128"), assembly.count("STG.128")) == (2, 4)
    within(assembly, weights=256 * 16 / 128, budget=6.3, blocks=4)
