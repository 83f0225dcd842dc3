"""A 2:4 weight back to a dense one, for products that a library does better on dense weights.

With many tokens, the multiplication takes so long that writing the weight out first costs little (a sixth at 2 048
tokens on an H100, by its memory's speed): one dense buffer, large enough for the largest weight, serves all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.triton_kernels._arguments import dense_output
from llmprune.triton_kernels.pack_24 import check_24, positions_24

__all__ = ["decompress_24", "decompress_24_torch"]


def decompress_24_torch(values: Tensor, index: Tensor) -> Tensor:
    """The dense weight, in plain torch: what `decompress_24` is measured against.

    Parameters
    ----------
    values : (N, K/2) of any dtype
    index : (N, ceil(K/8)) uint8

    Returns
    -------
    (N, K) in the values' dtype; stored entries have the same bits
    """
    rows, kept = values.shape
    columns = positions_24(index, kept // 2).long()
    dense = values.new_zeros(rows, kept // 2, 4)
    return dense.scatter_(2, columns, values.reshape(rows, kept // 2, 2)).view(rows, 2 * kept)


def decompress_24(values: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The dense weight, on a GPU, bit for bit what was packed.

    Weights that the kernel cannot take (not 16-bit, K no multiple of 8, N · K none of 16) go through the plain-torch
    way, with the same result.

    Parameters
    ----------
    values : (N, K/2)
    index : (N, ceil(K/8)) uint8
    out : where to write it, (N, K), contiguous, of the values' dtype; None: new memory

    Returns
    -------
    (N, K): `out` if it was given

    Raises
    ------
    ValueError : if the tensors do not belong together, or no kernel runs where they are
    """
    check_24(values, index)
    shape = (len(values), 2 * values.shape[1])
    out = dense_output(out, shape=shape, dtype=values.dtype, device=values.device)
    _decompress_24(values, index, out)
    return out


@torch.library.custom_op("llmprune::decompress_24", mutates_args=("out",))
def _decompress_24(values: Tensor, index: Tensor, out: Tensor) -> None:
    from llmprune.triton_kernels._launch import check_device

    check_device(values, "decompress_24")
    if values.element_size() == 2 and out.shape[1] % 8 == 0 and out.numel() % 16 == 0:
        if out.numel():
            from llmprune.triton_kernels._decompress_24_kernel import launch_decompress_24

            launch_decompress_24(values, index, out)
    else:
        out.copy_(decompress_24_torch(values, index))
