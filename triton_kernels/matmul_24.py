"""y = x · Wᵀ + bias with a 2:4 weight that stays packed: 0.5625 of a 16-bit weight's bytes are read.

Three kernels stand behind it (`configs_24.py` names them and their settings): "mma" on sparse tensor cores for up to
about 64 tokens, and, for shapes and GPUs that these do not take, "gemv" for up to 4 tokens and "expand_dot" for more.
With many tokens reading the weight is no longer what takes time; then expand it once (`decompress_24`) and multiply
densely.

Sums are float32 and in a fixed order: the same call gives the same bits. No gradients: weights are for inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.triton_kernels._arguments import check_product
from llmprune.triton_kernels.configs_24 import Config24, Gemv, Mma, Shape24, default_24, parse_24
from llmprune.triton_kernels.decompress_24 import decompress_24_torch
from llmprune.triton_kernels.pack_24 import check_24, meta_24

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
    check_24(values, index)
    shape = (len(values), 2 * values.shape[1])
    check_product(x, bias, shape=shape, dtype=values.dtype, device=values.device)
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    weight = [values, index] if meta is None else [values, index, meta]
    y: Tensor = _matmul_24(tokens, weight, bias, config="" if config is None else str(config))
    return y.view(*x.shape[:-1], len(values))


def shape_24(x: Tensor, values: Tensor) -> Shape24:
    """The product's shape, as `candidates_24` and `default_24` ask for it. x (…, K), values (N, K/2)."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    K = x.shape[-1]
    return Shape24(M=x.shape[:-1].numel(), N=len(values), K=K, dtype=x.dtype, capability=capability)


@torch.library.custom_op("llmprune::matmul_24", mutates_args=())
def _matmul_24(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, config: str) -> Tensor:
    """x (M, K) and (values, index), perhaps with meta → (M, N). The config is a word, for arguments must be plain."""
    from llmprune.triton_kernels._launch import check_device

    check_device(x, "matmul_24")
    values, index, *meta = weight
    shape = shape_24(x, values)
    if not (shape.M and shape.N and shape.K):
        return x.new_zeros(shape.M, shape.N) if bias is None else bias.expand(shape.M, shape.N).clone()
    chosen = parse_24(config) if config else default_24(shape)
    if refusal := chosen.refusal(shape):
        raise ValueError(f"the 2:4 kernel {chosen.kernel} {refusal}: choose another one, or none for the default")
    # Each kernel's file is loaded when it is first needed: that loads triton.
    if isinstance(chosen, Mma):
        from llmprune.triton_kernels._matmul_24_mma_kernel import launch_mma_24

        return launch_mma_24(x, values, meta[0] if meta else meta_24(index), bias=bias, config=chosen)
    if isinstance(chosen, Gemv):
        from llmprune.triton_kernels._matmul_24_gemv_kernel import launch_gemv_24

        return launch_gemv_24(x, values, index, bias=bias, config=chosen)
    from llmprune.triton_kernels._matmul_24_expand_dot_kernel import launch_expand_dot_24

    return launch_expand_dot_24(x, values, index, bias=bias, config=chosen)


@_matmul_24.register_fake
def _(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, *, config: str) -> Tensor:
    return x.new_empty(x.shape[0], weight[0].shape[0])
