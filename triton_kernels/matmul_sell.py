"""Multiply 1 to 4 tokens with a sparse weight of any pattern, stored as SELL-32 with 4-bit gaps.

This is the product of text generation: the whole weight is read for a token or few, so its bytes are its time. At 20
bits for each kept entry and half of the weights zero, it can at best be 1.6 times as fast as a dense product in 16
bits; 2 times with 60 % zeros and 2.7 times with 70 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.triton_kernels._arguments import check_product
from llmprune.triton_kernels.configs_sell import default_warps
from llmprune.triton_kernels.pack_sell import SellWeight, unpack_sell

__all__ = ["MOST_TOKENS_SELL", "matmul_sell", "matmul_sell_torch"]

MOST_TOKENS_SELL = 4


def matmul_sell_torch(x: Tensor, weight: SellWeight, *, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias in plain torch, in float32: what `matmul_sell` is measured against. Any number of tokens."""
    product = F.linear(x.float(), unpack_sell(weight).float(), None if bias is None else bias.float())
    return product.to(x.dtype)


def matmul_sell(x: Tensor, weight: SellWeight, *, bias: Tensor | None = None, warps: int | None = None) -> Tensor:
    """x · Wᵀ + bias on a GPU, with float32 sums; the same bits each time.

    Parameters
    ----------
    x : (..., in_features), 0 to 4 tokens in all, the weight's dtype
    weight : what `pack_sell` made
    bias : (out_features,) or None
    warps : of one program, a power of two that divides weight.parts; None: as many as leave programs enough

    Returns
    -------
    (..., out_features), in x's dtype. An infinite activation may give NaN where a dense product gives infinity.

    Raises
    ------
    ValueError : if the tensors do not fit each other, or no kernel runs where they are
    """
    check_product(x, bias, shape=weight.shape, dtype=weight.dtype, device=weight.words.device)
    tokens = x.shape[:-1].numel()
    if tokens > MOST_TOKENS_SELL:
        raise ValueError(
            f"matmul_sell takes at most {MOST_TOKENS_SELL} tokens, got {tokens}; "
            "use matmul_bitmap, or decompress the weight and multiply as usual"
        )
    if warps is None:
        warps = default_warps(weight.starts.shape[0], weight.parts)
    elif warps < 1 or weight.parts % warps or warps & (warps - 1):
        raise ValueError(f"warps must be a power of two that divides the weight's {weight.parts} parts, got {warps}")
    flat = x.reshape(tokens, weight.in_features)
    y: Tensor = _matmul_sell(flat, weight.tensors, bias, out_features=weight.out_features, warps=warps)
    return y.view(*x.shape[:-1], weight.out_features)


@torch.library.custom_op("llmprune::matmul_sell", mutates_args=())
def _matmul_sell(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, out_features: int, warps: int) -> Tensor:
    from llmprune.triton_kernels._launch import check_device

    check_device(x, "matmul_sell")
    sell = SellWeight.of(weight, (out_features, x.shape[1]), x.dtype)
    if not x.shape[0] or not out_features:
        return x.new_empty(x.shape[0], out_features)
    if not sell.words.numel():  # nothing is kept: no x may even be read, for there may be no inputs
        y = x.new_zeros(x.shape[0], out_features)
        return y if bias is None else y + bias
    from llmprune.triton_kernels._matmul_sell_kernel import launch_matmul_sell

    return launch_matmul_sell(x, sell, bias=bias, warps=warps)


@_matmul_sell.register_fake
def _(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, out_features: int, warps: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)
