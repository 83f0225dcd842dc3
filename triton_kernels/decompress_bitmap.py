"""A bitmap weight back to a dense one, for products that a library does better on dense weights.

Serves every pattern and every floating dtype: unstructured weights, n:m other than 2:4, float32. One dense buffer,
large enough for the largest weight, can serve all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    shape, values = (weight.out_features, weight.in_features), weight.values
    if out is None:
        out = values.new_empty(shape)
    elif out.shape != shape or out.dtype != values.dtype or out.device != values.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {shape}, {values.dtype} on {values.device}; "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}, strides {out.stride()}"
        )
    _decompress_bitmap(values, weight.masks, weight.offsets, weight.row_starts, out)
    return out


@torch.library.custom_op("llmprune::decompress_bitmap", mutates_args=("out",))
def _decompress_bitmap(values: Tensor, masks: Tensor, offsets: Tensor, row_starts: Tensor, out: Tensor) -> None:
    from llmprune.triton_kernels._launch import check_device

    check_device(values, "decompress_bitmap")
    if out.numel():
        from llmprune.triton_kernels._decompress_bitmap_kernel import launch_decompress_bitmap

        launch_decompress_bitmap(BitmapWeight(values, masks, offsets, row_starts, out.shape[1]), out)


@_decompress_bitmap.register_fake
def _(values: Tensor, masks: Tensor, offsets: Tensor, row_starts: Tensor, out: Tensor) -> None:
    return None
