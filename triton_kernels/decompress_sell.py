"""A SELL weight back to a dense one, so that a weight stored only for few tokens can also serve many."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.triton_kernels.pack_sell import SellWeight, unpack_sell

__all__ = ["decompress_sell", "decompress_sell_torch"]


def decompress_sell_torch(weight: SellWeight) -> Tensor:
    """The dense weight (out_features, in_features), in plain torch: what `decompress_sell` is measured against."""
    return unpack_sell(weight)


def decompress_sell(weight: SellWeight, *, out: Tensor | None = None) -> Tensor:
    """The dense weight, on a GPU: the same bits, where kept entries are those with non-zero bits.

    Parameters
    ----------
    weight : what `pack_sell` made
    out : where to write it, (out_features, in_features), contiguous, of the values' dtype; None: new memory

    Returns
    -------
    (out_features, in_features): `out` if it was given

    Raises
    ------
    ValueError : if `out` does not fit, or no kernel runs where the weight is
    """
    shape, words = (weight.out_features, weight.in_features), weight.words
    if out is None:
        out = words.new_empty(shape, dtype=weight.dtype)
    elif out.shape != shape or out.dtype != weight.dtype or out.device != words.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {shape}, {weight.dtype} on {words.device}; "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}, strides {out.stride()}"
        )
    _decompress_sell(words, weight.starts, weight.slice_blocks, weight.row_order, out)
    return out


@torch.library.custom_op("llmprune::decompress_sell", mutates_args=("out",))
def _decompress_sell(words: Tensor, starts: Tensor, slice_blocks: Tensor, row_order: Tensor, out: Tensor) -> None:
    from llmprune.triton_kernels._launch import check_device

    check_device(words, "decompress_sell")
    if not words.numel():
        out.zero_()
    elif out.numel():
        from llmprune.triton_kernels._decompress_sell_kernel import launch_decompress_sell

        weight = SellWeight(words, starts, slice_blocks, row_order, out.shape[0], out.shape[1], out.dtype)
        launch_decompress_sell(weight, out)


@_decompress_sell.register_fake
def _(words: Tensor, starts: Tensor, slice_blocks: Tensor, row_order: Tensor, out: Tensor) -> None:
    return None
