"""What the kernels for unstructured weights cost before memory does, without a GPU: compiled for one, and counted.

Each number is what was counted when the kernel was last changed; a tenth more is a regression. Instructions are those
of a thread: for each kept entry in the main loop of SELL kernels, for each dense weight position in bitmap kernels. In
the time in which it reads it, an H100 can issue about 24 for an entry of SELL, 12 for a weight in a bitmap, half kept.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton.language as tl

from llmprune.triton_kernels._decompress_bitmap_kernel import COLUMNS, ROWS, decompress_bitmap_kernel
from llmprune.triton_kernels._decompress_sell_kernel import decompress_sell_kernel
from llmprune.triton_kernels._matmul_bitmap_kernel import matmul_bitmap_kernel
from llmprune.triton_kernels._matmul_sell_kernel import matmul_sell_kernel
from llmprune.triton_kernels.configs_bitmap import BitmapDot
from llmprune.triton_kernels.testing.aot import Assembly, compile_kernel
from tests.triton.launched import SLACK, constants

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])

SELL = {"words_ptr": "*i32", "starts_ptr": "*i16", "slice_blocks_ptr": "*i32", "row_order_ptr": "*i32"}
BITMAP = {"masks_ptr": "*i32", "offsets_ptr": "*i16", "row_starts_ptr": "*i32"}


def sell(capability: int, *, tokens: int = 1, warps: int = 8, dtype: tl.dtype = tl.bfloat16) -> Assembly:
    """The product as it is launched with all parts of a slice in one program."""
    word = {1: "*i16", 2: "*i32", 3: "*i64", 4: "*i64"}[tokens]
    half = "*bf16" if dtype == tl.bfloat16 else "*fp16"
    signature = {"x_ptr": word, **SELL, "bias_ptr": half, "out_ptr": half, "rows": "i32"}
    settings = {"PARTS": warps, "WARPS": warps, "TOKENS": tokens, "DTYPE": dtype, "HAS_BIAS": True, "PTX": True}
    return compile_kernel(matmul_sell_kernel, signature, settings, capability=capability, warps=warps)


def bitmap(capability: int, config: BitmapDot) -> Assembly:
    """The product as it is launched for 4096 inputs, with one program for each tile."""
    half = "*bf16"
    signature = {"x_ptr": half, "words_ptr": "*i32", **BITMAP, "bias_ptr": half, "y_ptr": half, "M": "i32", "N": "i32"}
    settings = constants(matmul_bitmap_kernel, config, K=4096, WORDS=128)
    return compile_kernel(matmul_bitmap_kernel, signature, settings, capability=capability, warps=config.warps)


def decompress(capability: int, word: str) -> Assembly:
    """The decompression as it is launched for 4096 inputs."""
    signature = {"values_ptr": word, **BITMAP, "dense_ptr": word, "N": "i32", "K": "i32"}
    settings = {"WORDS": 128, "ROWS": ROWS, "COLUMNS": COLUMNS, "PTX": True}
    aligned = [*(name for name in signature if name.endswith("_ptr")), "K"]
    return compile_kernel(decompress_bitmap_kernel, signature, settings, capability=capability, aligned=aligned)


@CAPABILITIES
@pytest.mark.parametrize(("tokens", "warps", "price"), [(1, 8, 8.9), (1, 32, 8.9), (2, 8, 10.7), (4, 8, 15.1)])
def test_sell_walks_at_its_price(capability: int, tokens: int, warps: int, price: float) -> None:
    kernel = sell(capability, tokens=tokens, warps=warps)
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= 40, "with more, fewer warps fit than hide the memory's latency"
    assert kernel.count("BAR") == 0, "warps must not wait for each other in the loop"
    assert kernel.count("FFMA") == 16 * tokens, "the loop should take two blocks of eight entries a turn"
    assert len(kernel.loop) / 16 <= price * SLACK


@CAPABILITIES
def test_sell_in_float16_costs_about_as_much(capability: int) -> None:
    kernel = sell(capability, dtype=tl.float16)
    assert kernel.spilled_bytes == 0
    assert len(kernel.loop) / 16 <= 8.9 * SLACK


@CAPABILITIES
def test_sell_is_written_out_without_spilling(capability: int) -> None:
    signature = {**SELL, "dense_ptr": "*i16", "rows": "i32", "columns": "i32"}
    settings = {"PARTS": 8, "WARPS": 8, "PTX": True}
    kernel = compile_kernel(decompress_sell_kernel, signature, settings, capability=capability, warps=8)
    assert kernel.spilled_bytes == 0
    assert kernel.count("BAR") == 0
    assert len(kernel.loop) / 8 <= 9.0 * SLACK


@CAPABILITIES
@pytest.mark.parametrize(("tokens", "price"), [(16, 10.4), (64, 15.5)])
def test_bitmap_multiplies_at_its_price(capability: int, tokens: int, price: float) -> None:
    config = BitmapDot(tokens=tokens)
    kernel = bitmap(capability, config)
    assert kernel.spilled_bytes == 0
    assert kernel.count("HGMMA" if capability == 90 else "HMMA") > 0, "tensor cores"
    weights = config.rows * config.inputs / (config.warps * 32)
    assert len(kernel.loop) / weights <= price * SLACK


@CAPABILITIES
@pytest.mark.parametrize(("word", "stores"), [("*i16", 1), ("*i32", 2)])
def test_bitmap_is_written_out_in_whole_lines(capability: int, word: str, stores: int) -> None:
    kernel = decompress(capability, word)
    assert kernel.spilled_bytes == 0
    assert kernel.count("STG.128", everywhere=True) == stores, "eight columns of a thread lie side by side"
    assert len(kernel.program) / 8 <= 19.0 * SLACK
