"""A bitmap weight back to a dense one, for products that a library does better on dense weights.

Serves every pattern and every floating dtype: unstructured weights, n:m other than 2:4, float32. One dense buffer,
large enough for the largest weight, can serve all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.triton_kernels._arguments import dense_output
from llmprune.triton_kernels.pack_bitmap import BitmapWeight, unpack_bitmap

__all__ = ["decompress_bitmap", "decompress_bitmap_torch"]


def decompress_bitmap_torch(weight: BitmapWeight) -> Tensor:
    """The dense weight (out_features, in_features), in plain torch: what `decompress_bitmap` is measured against."""
    return unpack_bitmap(weight)


def decompress_bitmap(weight: BitmapWeight, *, out: Tensor | None = None) -> Tensor:
    """The dense weight, on a GPU, bit for bit what was packed.

    Parameters
    ----------
    weight : what `pack_bitmap` made, with values of 16, 32 or 64 bits
    out : where to write it, (out_features, in_features), contiguous, of the values' dtype; None: new memory

    Returns
    -------
    (out_features, in_features): `out` if it was given

    Raises
    ------
    ValueError : if `out` does not fit, or no kernel runs where the weight is
    """
    values = weight.values
    out = dense_output(out, shape=weight.shape, dtype=values.dtype, device=values.device)
    _decompress_bitmap(weight.tensors, out)
    return out


@torch.library.custom_op("llmprune::decompress_bitmap", mutates_args=("out",))
def _decompress_bitmap(weight: Sequence[Tensor], out: Tensor) -> None:
    from llmprune.triton_kernels._launch import check_device

    check_device(out, "decompress_bitmap")
    if out.numel():
        from llmprune.triton_kernels._decompress_bitmap_kernel import launch_decompress_bitmap

        launch_decompress_bitmap(BitmapWeight.of(weight, out.shape[1]), out)
