"""The ways to multiply with a packed weight on an NVIDIA GPU, by the kernels in `triton_kernels/`.

2:4          "kernel", which chooses its settings by shape, and every other setting that is worth timing by its own name
any pattern  "sell" for up to 4 tokens (a second form of the weight, 20 bits a kept value, is held besides), and the
             product with bitmaps for up to 64 by the names of its settings
2:4, many    "cusparselt": NVIDIA's library, through torch (a second form is held besides)

Without triton there are none of these, and nothing here imports it: the kernels do, at their first launch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.runtime.weight import Path, SparseWeight
from llmprune.sparsity.pack import unpack

if TYPE_CHECKING:
    from llmprune.triton_kernels.pack_bitmap import BitmapWeight
    from llmprune.triton_kernels.pack_sell import SellWeight

__all__ = ["CUSPARSELT", "available", "expand", "paths"]

CUSPARSELT = "cusparselt"

HALF = (torch.bfloat16, torch.float16)

MOST_TOKENS_24 = 256
"""Beyond, a product that reads the packed weight again and again is not worth timing in all its settings."""

CUSPARSELT_TOKENS = 64
"""From how many tokens NVIDIA's library is worth timing; below, it pads."""


@cache
def available() -> bool:
    """Whether triton is there, and the GPU is one that the kernels were written for."""
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


def paths(weight: SparseWeight, tokens: int) -> dict[str, Callable[[], Path]]:
    """The ways of this weight for so many tokens, each with the function that makes it."""
    if not available() or weight.dtype not in HALF or not weight.values.numel():
        return {}
    if weight.pattern == "2:4":
        return _paths_24(weight, tokens)
    return _paths_any(weight, tokens) if _fits_bitmap(weight) else {}


def expand(weight: SparseWeight, out: Tensor) -> Tensor:
    """The dense weight (out_features, in_features) in `out`."""
    from llmprune.triton_kernels.decompress_24 import decompress_24
    from llmprune.triton_kernels.decompress_bitmap import decompress_bitmap

    if weight.pattern == "2:4" and weight.dtype in HALF:
        return decompress_24(weight.values, weight.index, out=out)
    if _fits_bitmap(weight):
        return decompress_bitmap(weight.once(_bitmap), out=out)
    return unpack(weight.packed, out)


def _paths_24(weight: SparseWeight, tokens: int) -> dict[str, Callable[[], Path]]:
    from llmprune.triton_kernels.configs_24 import Shape24, candidates_24, default_24

    capability = torch.cuda.get_device_capability(weight.device)
    shape = Shape24(tokens, weight.out_features, weight.in_features, weight.dtype, capability)
    ways: dict[str, Callable[[], Path]] = {}
    with suppress(ValueError):  # raised if no kernel takes this shape
        default_24(shape)
        ways["kernel"] = partial(_kernel_24, weight, None)
    if tokens <= MOST_TOKENS_24:
        ways |= {str(config): partial(_kernel_24, weight, str(config)) for config in candidates_24(shape)}
    if tokens >= CUSPARSELT_TOKENS and torch.backends.cusparselt.is_available():
        ways[CUSPARSELT] = partial(_cusparselt, weight)
    return ways


def _kernel_24(weight: SparseWeight, config: str | None) -> Path:
    from llmprune.triton_kernels.matmul_24 import matmul_24

    fits = weight.out_features % 16 == 0 and weight.in_features % 64 == 0
    reads_meta = config is None or config.startswith("mma")  # it takes as much memory as the index
    meta = weight.once(_meta) if fits and reads_meta else None
    return lambda x: matmul_24(x, weight.values, weight.index, meta=meta, bias=weight.bias, config=config)


def _cusparselt(weight: SparseWeight) -> Path:
    sparse = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(unpack(weight.packed))
    return lambda x: F.linear(x, sparse, weight.bias)


def _fits_bitmap(weight: SparseWeight) -> bool:
    from llmprune.triton_kernels.pack_bitmap import MOST_INPUTS, MOST_VALUES

    return weight.in_features <= MOST_INPUTS and weight.values.numel() < MOST_VALUES


def _paths_any(weight: SparseWeight, tokens: int) -> dict[str, Callable[[], Path]]:
    from llmprune.triton_kernels.configs_bitmap import MOST_TOKENS_BITMAP, candidates_bitmap
    from llmprune.triton_kernels.matmul_sell import MOST_TOKENS_SELL

    ways: dict[str, Callable[[], Path]] = {}
    if tokens <= MOST_TOKENS_SELL:
        ways["sell"] = partial(_kernel_sell, weight)
    if tokens <= MOST_TOKENS_BITMAP:
        configs = candidates_bitmap(tokens, weight.out_features, weight.in_features)
        ways |= {str(config): partial(_kernel_bitmap, weight, str(config)) for config in configs}
    return ways


def _kernel_sell(weight: SparseWeight) -> Path:
    from llmprune.triton_kernels.matmul_sell import matmul_sell

    sell = weight.once(_sell)
    return lambda x: matmul_sell(x, sell, bias=weight.bias)


def _kernel_bitmap(weight: SparseWeight, config: str) -> Path:
    from llmprune.triton_kernels.matmul_bitmap import matmul_bitmap

    bitmap = weight.once(_bitmap)
    return lambda x: matmul_bitmap(x, bitmap, bias=weight.bias, config=config)


# Second forms, made once ----------------------------------------------------------------------------------------------


def _meta(weight: SparseWeight) -> Tensor:
    from llmprune.triton_kernels.pack_24 import meta_24

    return meta_24(weight.index)


def _sell(weight: SparseWeight) -> SellWeight:
    from llmprune.triton_kernels.pack_sell import pack_sell

    return pack_sell(weight.values.flatten(), weight.index, weight.in_features)


def _bitmap(weight: SparseWeight) -> BitmapWeight:
    from llmprune.triton_kernels.pack_bitmap import pack_bitmap

    return pack_bitmap(weight.values.flatten(), weight.index, weight.in_features)
