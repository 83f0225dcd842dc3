"""Multiply up to 64 tokens with a sparse weight of any pattern, stored as values and bitmap.

Between the few tokens of `matmul_sell` and the many for which a weight is better written out once
(`decompress_bitmap`) and multiplied densely. By its count of instructions the expansion takes a GPU with fast memory,
an A100 or H100, nearly all the time that it saves in reading, up to about 60 % zeros; GPUs with slower memory should
gain from 50 % on. Not measured yet: whoever can choose should time both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.triton_kernels._arguments import check_product
from llmprune.triton_kernels.configs_bitmap import MOST_TOKENS_BITMAP, BitmapDot, default_bitmap, parse_bitmap
from llmprune.triton_kernels.pack_bitmap import BitmapWeight, unpack_bitmap

__all__ = ["matmul_bitmap", "matmul_bitmap_torch"]


def matmul_bitmap_torch(x: Tensor, weight: BitmapWeight, *, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias in plain torch, in float32: what `matmul_bitmap` is measured against. Any number of tokens."""
    product = F.linear(x.float(), unpack_bitmap(weight).float(), None if bias is None else bias.float())
    return product.to(x.dtype)


def matmul_bitmap(
    x: Tensor, weight: BitmapWeight, *, bias: Tensor | None = None, config: BitmapDot | str | None = None
) -> Tensor:
    """x · Wᵀ + bias on a GPU, with float32 sums; the same bits each time.

    Parameters
    ----------
    x : (..., in_features), 0 to 64 tokens in all, bfloat16 or float16, the weight's dtype
    weight : what `pack_bitmap` made
    bias : (out_features,) or None
    config : one of `candidates_bitmap`, or its word; None: `default_bitmap`

    Returns
    -------
    (..., out_features), in x's dtype

    Raises
    ------
    ValueError : if the tensors do not fit each other, or no kernel runs where they are
    """
    tokens = x.shape[:-1].numel()
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"matmul_bitmap takes bfloat16 or float16, got {x.dtype}; use decompress_bitmap for others")
    check_product(x, bias, shape=weight.shape, dtype=weight.values.dtype, device=weight.values.device)
    if tokens > MOST_TOKENS_BITMAP:
        raise ValueError(
            f"matmul_bitmap takes at most {MOST_TOKENS_BITMAP} tokens, got {tokens}; "
            "use decompress_bitmap and multiply as usual"
        )
    if config is None:
        config = default_bitmap(tokens, *weight.shape)
    elif isinstance(config, str):
        config = parse_bitmap(config)
    if config.tokens < tokens:
        raise ValueError(f"the config's tile must hold all {tokens} tokens, got {config}")
    flat = x.reshape(tokens, weight.in_features)
    y: Tensor = _matmul_bitmap(flat, weight.tensors, bias, config=str(config))
    return y.view(*x.shape[:-1], weight.out_features)


@torch.library.custom_op("llmprune::matmul_bitmap", mutates_args=())
def _matmul_bitmap(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, config: str) -> Tensor:
    from llmprune.triton_kernels._launch import check_device

    check_device(x, "matmul_bitmap")
    bitmap = BitmapWeight.of(weight, x.shape[1])
    if not x.shape[0] or not bitmap.out_features:
        return x.new_empty(x.shape[0], bitmap.out_features)
    from llmprune.triton_kernels._matmul_bitmap_kernel import launch_matmul_bitmap

    return launch_matmul_bitmap(x, bitmap, bias=bias, config=parse_bitmap(config))


@_matmul_bitmap.register_fake
def _(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, config: str) -> Tensor:
    return x.new_empty(x.shape[0], BitmapWeight.of(weight, x.shape[1]).out_features)
