"""Adding up what several blocks of threads found for the same outputs, always in the same order.

Where a product has too few rows to occupy a GPU, its inputs are dealt out to several parts (split-K), which leave
float32 sums in a workspace. Adding with atomics would need no workspace, but then the order, and with it the last
bits, would change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.triton_kernels._launch import OPTIONS, blocks, on_device

__all__ = ["Sums", "sum_parts", "sum_parts_kernel"]

BLOCK = 256


@triton.jit
def sum_parts_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y = Σ parts + bias, for `count` = M · N entries. parts (PARTS, M, N) float32, bias (N,), y (M, N)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    of_part = at
    for _ in tl.static_range(PARTS):
        total += tl.load(parts_ptr + of_part, mask=inside, other=0.0)
        of_part += count
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Write Σ parts + bias into y.

    Parameters
    ----------
    parts : (PARTS, M, N) float32
    bias : (N,) or None
    y : (M, N), contiguous

    Returns
    -------
    y
    """
    with on_device(y):
        sum_parts_kernel[(blocks(y.numel(), BLOCK),)](
            parts,
            y if bias is None else bias,
            y,
            y.numel(),
            y.shape[1],
            PARTS=len(parts),
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return y


class Sums:
    """Where the blocks of a product leave their sums: the result itself, or a workspace if they are but parts of them.

    Parameters
    ----------
    x : (M, K), whose dtype and device the result has
    outputs : N, of the weight
    bias : (N,) or None
    parts : how many blocks share the inputs of one output

    Attributes
    ----------
    out : what the kernel writes, (M, N) of x's dtype, or (parts, M, N) float32
    bias, has_bias : what the kernel adds, and whether it does; several parts leave that to `total`
    """

    def __init__(self, x: Tensor, outputs: int, *, bias: Tensor | None, parts: int) -> None:
        self._y, self._bias, self._split = x.new_empty(len(x), outputs), bias, parts > 1
        self.out = x.new_empty(parts, len(x), outputs, dtype=torch.float32) if self._split else self._y
        self.bias = self.out if bias is None else bias  # without a bias any pointer will do
        self.has_bias = bias is not None and not self._split

    def total(self) -> Tensor:
        """The product, (M, N) in x's dtype, once the kernel has been launched."""
        return sum_parts(self.out, self._bias, self._y) if self._split else self._y
