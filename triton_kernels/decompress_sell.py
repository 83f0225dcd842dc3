"""A SELL weight back to a dense one, so that a weight stored only for few tokens can also serve many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.triton_kernels._arguments import dense_output
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
    out = dense_output(out, shape=weight.shape, dtype=weight.dtype, device=weight.words.device)
    _decompress_sell(weight.tensors, out)
    return out


@torch.library.custom_op("llmprune::decompress_sell", mutates_args=("out",))
def _decompress_sell(weight: Sequence[Tensor], out: Tensor) -> None:
    from llmprune.triton_kernels._launch import check_device

    check_device(out, "decompress_sell")
    sell = SellWeight.of(weight, (out.shape[0], out.shape[1]), out.dtype)
    if not sell.words.numel():
        out.zero_()
    elif out.numel():
        from llmprune.triton_kernels._decompress_sell_kernel import launch_decompress_sell

        launch_decompress_sell(sell, out)
