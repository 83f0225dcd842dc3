"""What SparseGPT's sweep costs on a GPU, without one: compiled, and counted."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from llmprune.triton_kernels._sparsegpt_sweep_kernel import sparsegpt_sweep_kernel, tile_of
from llmprune.triton_kernels.testing.aot import compile_kernel
from tests.triton.launched import SLACK

POINTERS = {"columns_ptr": "*fp32", "keep_ptr": "*u8", "factor_ptr": "*fp32", "errors_ptr": "*fp32"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("choose", "price"), [(True, 705), (False, 307)])
def test_a_column_has_its_price(capability: int, choose: bool, price: int) -> None:
    """Instructions of a thread for the columns that it meets in the longest loop."""
    tile = tile_of(128)
    settings = {"CHOOSE": choose, "COLUMNS": tile["COLUMNS"], "ROWS": tile["ROWS"]}
    signature = {**POINTERS, "rows": "i32", "count": "i32", "kept": "i32", "group": "i32"}
    kernel = compile_kernel(sparsegpt_sweep_kernel, signature, settings, capability=capability, warps=tile["num_warps"])
    assert kernel.spilled_bytes <= 24
    assert len(kernel.loop) <= price * SLACK
