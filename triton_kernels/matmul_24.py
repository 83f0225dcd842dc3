"""y = x · Wᵀ + bias with a 2:4 weight that stays packed: 0.5625 of a 16-bit weight's bytes are read.

Three kernels stand behind it (`configs_24.py` names them and their settings): "mma" on sparse tensor cores for up to
about 64 tokens, and, for shapes and GPUs that these do not take, "gemv" for up to 4 tokens and "expand_dot" for more.
With many tokens reading the weight is no longer what takes time; then expand it once (`decompress_24`) and multiply
densely.

Sums are float32 and in a fixed order: the same call gives the same bits. No gradients: weights are for inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.triton_kernels.configs_24 import Gemv, Mma, Shape24, default_24, parse_24
from llmprune.triton_kernels.decompress_24 import decompress_24_torch
from llmprune.triton_kernels.pack_24 import check_24, meta_24

if TYPE_CHECKING:
    from llmprune.triton_kernels.configs_24 import Config24

__all__ = ["matmul_24", "matmul_24_torch", "shape_24"]


def matmul_24_torch(x: Tensor, values: Tensor, index: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The product in plain torch, with any dtype on any device: expand, then multiply.

    Parameters
    ----------
    x : (…, K)
    values : (N, K/2) of x's dtype
    index : (N, ceil(K/8)) uint8
    bias : (N,)

    Returns
    -------
    (…, N) in x's dtype
    """
    return torch.nn.functional.linear(x, decompress_24_torch(values, index), bias)


def matmul_24(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    meta: Tensor | None = None,
    bias: Tensor | None = None,
    config: Config24 | str | None = None,
) -> Tensor:
    """The product on a GPU, by one kernel.

    Parameters
    ----------
    x : (…, K), any number of tokens
    values : (N, K/2) bfloat16 or float16, x's dtype
    index : (N, K/8) uint8
    meta : (N/16, K/64, 32) int32, the index as sparse tensor cores read it. Make it once, with `meta_24`: a call
        without it makes it each time that "mma" is used
    bias : (N,) of x's dtype
    config : which kernel and how, as `candidates_24` lists them; None: a choice by shape alone

    Returns
    -------
    (…, N) in x's dtype

    Raises
    ------
    ValueError : if the tensors do not belong together, or the kernel (with None: every kernel) cannot take this product
    """
    _check(x, values, index, bias)
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y: Tensor = _matmul_24(tokens, values, index, meta, bias, "" if config is None else str(config))
    return y.view(*x.shape[:-1], len(values))


def shape_24(x: Tensor, values: Tensor) -> Shape24:
    """The product's shape, as `candidates_24` and `default_24` ask for it. x (…, K), values (N, K/2)."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    K = x.shape[-1]
    return Shape24(M=x.shape[:-1].numel(), N=len(values), K=K, dtype=x.dtype, capability=capability)


def _check(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> None:
    check_24(values, index)
    rows, inputs = len(values), 2 * values.shape[1]
    if x.ndim == 0 or x.shape[-1] != inputs or x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"x is (…, {inputs}), {values.dtype} on {values.device}, as the weight; "
            f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias is ({rows},), {x.dtype} on {x.device}; got {tuple(bias.shape)}, {bias.dtype} on {bias.device}"
        )


@torch.library.custom_op("llmprune::matmul_24", mutates_args=())
def _matmul_24(
    x: Tensor, values: Tensor, index: Tensor, meta: Tensor | None, bias: Tensor | None, config: str
) -> Tensor:
    """x (M, K) → (M, N). The config travels as a word, because an operation's arguments are plain."""
    from llmprune.triton_kernels._launch import check_device

    check_device(x, "matmul_24")
    shape = shape_24(x, values)
    if not (shape.M and shape.N and shape.K):
        return x.new_zeros(shape.M, shape.N) if bias is None else bias.expand(shape.M, shape.N).clone()
    chosen = parse_24(config) if config else default_24(shape)
    if refusal := chosen.refusal(shape):
        raise ValueError(f"the 2:4 kernel {chosen.kernel} {refusal}: choose another one, or none for the default")
    return _launch(x, values, index, meta, bias, chosen)


def _launch(
    x: Tensor, values: Tensor, index: Tensor, meta: Tensor | None, bias: Tensor | None, config: Config24
) -> Tensor:
    """Each kernel's file is loaded when it is first needed: that loads triton."""
    if isinstance(config, Mma):
        from llmprune.triton_kernels._matmul_24_mma_kernel import mma_24

        return mma_24(x, values, meta_24(index) if meta is None else meta, bias=bias, config=config)
    if isinstance(config, Gemv):
        from llmprune.triton_kernels._matmul_24_gemv_kernel import gemv_24

        return gemv_24(x, values, index, bias=bias, config=config)
    from llmprune.triton_kernels._matmul_24_expand_dot_kernel import expand_dot_24

    return expand_dot_24(x, values, index, bias=bias, config=config)


@_matmul_24.register_fake
def _(x: Tensor, values: Tensor, index: Tensor, meta: Tensor | None, bias: Tensor | None, config: str) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])
