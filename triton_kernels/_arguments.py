"""What the public operations ask of their arguments: kernels trust shapes, dtypes and devices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_product", "dense_output"]


def check_product(
    x: Tensor, bias: Tensor | None, *, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse activations and a bias that do not fit a weight.

    Parameters
    ----------
    x : (..., in_features)
    bias : (out_features,) or None
    shape, dtype, device : of the weight, (out_features, in_features)

    Raises
    ------
    ValueError : if a shape, dtype or device is another one
    """
    rows, inputs = shape
    if x.shape[-1:] != (inputs,) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"x must be (..., {inputs}), {dtype} on {device}, as the weight; "
            f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != dtype or bias.device != device):
        raise ValueError(
            f"bias must be ({rows},), {dtype} on {device}, as the weight; "
            f"got {tuple(bias.shape)}, {bias.dtype} on {bias.device}"
        )


def dense_output(out: Tensor | None, *, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a weight is written out: `out` if it fits, new memory if it is None.

    Raises
    ------
    ValueError : if `out` is of another shape, dtype or device, or not contiguous
    """
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {shape}, {dtype} on {device}; "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}, strides {out.stride()}"
        )
    return out
