"""The ways to multiply with a packed weight.

kernel    the CPU kernel reads the packed weight as it is: for few tokens, where reading the weight is what takes time
expand    the weight becomes dense in a buffer that all layers share, then torch multiplies: for many tokens
expand32  the same in float32, for 16-bit weights on a CPU without 16-bit instructions, where torch is slow with them
dense     the weight is held dense besides: torch's speed at the dense model's memory and more

A path is made for one weight and then called with x (..., in_features), which has the weight's dtype and is not empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.machine import compute_dtype
from llmprune.runtime import cpu, paths_cuda
from llmprune.runtime.scratch import scratch
from llmprune.runtime.weight import Path, SparseWeight
from llmprune.sparsity.pack import unpack

__all__ = ["DENSE", "HOLDING", "expanded", "paths"]

DENSE = "dense"

HOLDING = {DENSE, paths_cuda.CUSPARSELT}
"""Paths that hold the weight in another form besides, and so give up the packed form's memory."""


def paths(weight: SparseWeight, tokens: int) -> dict[str, Callable[[], Path]]:
    """The ways for this weight and so many tokens on its device, each with the function that makes it.

    `expand` and `dense` are always among them.
    """
    ways: dict[str, Callable[[], Path]] = {}
    if weight.device.type == "cuda":
        ways |= paths_cuda.paths(weight, tokens)
    if weight.device.type == "cpu" and weight.dtype in cpu.DTYPES and cpu.available() is not None:
        ways |= {"kernel": lambda: _kernel(weight)}
    ways |= {"expand": lambda: _expand(weight)}
    if weight.device.type == "cpu" and compute_dtype(weight.device, weight.dtype) != weight.dtype:
        ways |= {"expand32": lambda: _expand_to_float32(weight)}
    return ways | {DENSE: lambda: _dense(weight)}


def _kernel(weight: SparseWeight) -> Path:
    """The operator with everything bound that stays the same: this call is made for every linear and token."""
    cpu.available()
    product = torch.ops.llmprune.cpu_matmul.default
    values, index, starts, bias = weight.values, weight.index, weight.starts, weight.bias
    in_features = weight.in_features

    def path(x: Tensor) -> Tensor:
        y: Tensor = product(x, values, index, starts, bias, in_features=in_features)
        return y

    return path


def _expand(weight: SparseWeight) -> Path:
    return lambda x: F.linear(x, expanded(weight), weight.bias)


def _expand_to_float32(weight: SparseWeight) -> Path:
    bias = None if weight.bias is None else weight.bias.float()

    def path(x: Tensor) -> Tensor:
        shape = (weight.out_features, weight.in_features)
        wide = scratch(shape, torch.float32, weight.device).copy_(expanded(weight))
        return F.linear(x.float(), wide, bias).to(x.dtype)

    return path


def _dense(weight: SparseWeight) -> Path:
    return lambda x: F.linear(x, weight.dense, weight.bias)


def expanded(weight: SparseWeight) -> Tensor:
    """The dense weight in the shared buffer, by the fastest means there are on its device."""
    out = scratch((weight.out_features, weight.in_features), weight.dtype, weight.device)
    if weight.device.type == "cuda" and paths_cuda.available():
        return paths_cuda.expand(weight, out)
    if weight.device.type == "cpu" and weight.dtype in cpu.DTYPES and cpu.available() is not None:
        return cpu.expand(weight.values, weight.index, starts=weight.starts, in_features=weight.in_features, out=out)
    return unpack(weight.packed, out)
