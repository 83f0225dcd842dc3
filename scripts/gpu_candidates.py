"""The registry of products with a sparse weight on a GPU: what gpu_check tunes, checks and times.

To add a kernel: a row in `CANDIDATES`. A candidate has a *form* of the weight (tensors, made once and copied so that
the copies exceed the cache), *settings* (words, the default first; one empty word if there is nothing to choose) and a
*product* of x with that form under one of the settings.

On a CPU each kernel's plain-torch twin is in its place, so that all else can be tried there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_rows import DENSE, OURS, TORCH, kind
from gpu_weights import DTYPE, Weight, copied
from kernel_benchmarks import Case
from torch import Tensor

from llmprune.sparsity.pattern import parse_pattern
from llmprune.triton_kernels import configs_24, configs_bitmap, configs_sell
from llmprune.triton_kernels.decompress_24 import decompress_24, decompress_24_torch
from llmprune.triton_kernels.decompress_bitmap import decompress_bitmap, decompress_bitmap_torch
from llmprune.triton_kernels.decompress_sell import decompress_sell, decompress_sell_torch
from llmprune.triton_kernels.matmul_24 import matmul_24, matmul_24_torch
from llmprune.triton_kernels.matmul_bitmap import matmul_bitmap, matmul_bitmap_torch
from llmprune.triton_kernels.matmul_sell import MOST_TOKENS_SELL, matmul_sell, matmul_sell_torch
from llmprune.triton_kernels.pack_24 import meta_24
from llmprune.triton_kernels.pack_bitmap import pack_bitmap
from llmprune.triton_kernels.pack_sell import pack_sell

__all__ = ["CANDIDATES", "GpuCandidate", "candidates_for", "poison_scratch"]

MOST_TOKENS_24 = 256
"""Beyond, a product that reads the packed weight again and again cannot win against cuBLAS."""


@dataclass(frozen=True)
class GpuCandidate:
    """One way to multiply.

    role : "dense", "ours" or "torch"
    patterns : "2:4", "any"
    settings : words worth timing for a case on a GPU of this compute capability, the default first; none: it cannot
    form : the weight as it is read, a tensor, tuple or dataclass of tensors
    product : (x, form, word) → (tokens, rows)
    form_name : candidates that share it share their forms
    form_key : what of the word decides about the form
    copied : whether copies of a form are made by copying its tensors (else by making it again)
    """

    name: str
    role: str
    patterns: tuple[str, ...]
    settings: Callable[[Case, tuple[int, int] | None], Sequence[str]]
    form: Callable[[Weight, str], Any]
    product: Callable[[Tensor, Any, str], Tensor]
    form_name: str
    form_key: Callable[[str], str] = lambda word: ""
    copied: bool = True

    def another(self, weight: Weight, config: str, first: Any) -> Any:
        """One more copy of a form."""
        return copied(first) if self.copied else self.form(weight, config)


# Settings -------------------------------------------------------------------------------------------------------------


def _one(case: Case, capability: tuple[int, int] | None) -> list[str]:
    return [""]


def _kernel_24(kernel: type[configs_24.Config24]) -> Callable[[Case, tuple[int, int] | None], list[str]]:
    """The words of one of the 2:4 kernels. Its default comes first where it is the default of all."""

    def settings(case: Case, capability: tuple[int, int] | None) -> list[str]:
        if case.tokens > MOST_TOKENS_24:
            return []
        shape = configs_24.Shape24(case.tokens, case.rows, case.columns, DTYPE, capability)
        return [str(config) for config in configs_24.candidates_24(shape) if isinstance(config, kernel)]

    return settings


def _sell(case: Case, capability: tuple[int, int] | None) -> list[str]:
    if case.tokens > MOST_TOKENS_SELL:
        return []
    return [f"parts={parts},warps={warps}" for parts, warps in configs_sell.candidates_sell(*_sell_blocks(case))]


def _parts_alone(case: Case, capability: tuple[int, int] | None) -> list[str]:
    return [f"parts={configs_sell.default_parts(*_sell_blocks(case))}"]


def _sell_blocks(case: Case) -> tuple[int, int]:
    """(slices, blocks of one of them), about."""
    density = 1 - getattr(parse_pattern(case.pattern), "sparsity", 0.5)
    return -(-case.rows // 32), max(1, -(-int(case.columns * density) // 8))


def _sell_parts(word: str) -> str:
    return word.partition(",")[0]


def _numbers(word: str) -> tuple[int, ...]:
    """ "parts=16,warps=8" → (16, 8)."""
    return tuple(int(setting.partition("=")[2]) for setting in word.split(","))


def _bitmap(case: Case, capability: tuple[int, int] | None) -> list[str]:
    if case.tokens > configs_bitmap.MOST_TOKENS_BITMAP:
        return []
    return [str(config) for config in configs_bitmap.candidates_bitmap(case.tokens, case.rows, case.columns)]


def _cutlass(case: Case, capability: tuple[int, int] | None) -> list[str]:
    return [""] if hasattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS") else []


def _cusparselt(case: Case, capability: tuple[int, int] | None) -> list[str]:
    return [""] if torch.backends.cusparselt.is_available() else []


# Forms ----------------------------------------------------------------------------------------------------------------


def _as_dense(weight: Weight, word: str) -> Tensor:
    return weight.dense


def _as_24(weight: Weight, word: str) -> tuple[Tensor, ...]:
    """values, index, and what tensor cores read where they can take the shape."""
    packed = weight.packed
    fits = packed.rows % 16 == 0 and packed.in_features % 64 == 0
    return (packed.values, packed.index, *([meta_24(packed.index)] if fits else []))


def _as_24_for_scratch(weight: Weight, word: str) -> tuple[Tensor, ...]:
    return weight.packed.values, weight.packed.index


def _as_sell(weight: Weight, word: str) -> Any:
    packed = weight.packed
    return pack_sell(packed.values.flatten(), packed.index, packed.in_features, parts=_numbers(word)[0])


def _as_bitmap(weight: Weight, word: str) -> Any:
    packed = weight.packed
    return pack_bitmap(packed.values.flatten(), packed.index, packed.in_features)


def _as_semi_structured(name: str) -> Callable[[Weight, str], Any]:
    def form(weight: Weight, word: str) -> tuple[Tensor]:
        return (getattr(torch.sparse, f"SparseSemiStructuredTensor{name}").from_dense(weight.dense),)

    return form


_buffers: dict[torch.device, Tensor] = {}


def _scratch(rows: int, columns: int, device: torch.device) -> Tensor:
    """One buffer for all copies, as in the runtime; larger than the last one only if need be."""
    buffer = _buffers.get(device)
    if buffer is None or buffer.numel() < rows * columns:
        _buffers.pop(device, None)
        buffer = _buffers[device] = torch.empty(rows * columns, dtype=DTYPE, device=device)
    return buffer[: rows * columns].view(rows, columns)


# Products -------------------------------------------------------------------------------------------------------------


def _dense_product(x: Tensor, form: Tensor, word: str) -> Tensor:
    return F.linear(x, form)


def _product_24(x: Tensor, form: tuple[Tensor, ...], word: str) -> Tensor:
    values, index, *meta = form
    if not x.is_cuda:
        return matmul_24_torch(x, values, index)
    return matmul_24(x, values, index, meta=meta[0] if meta else None, config=word)


def _product_sell(x: Tensor, form: Any, word: str) -> Tensor:
    return matmul_sell(x, form, warps=_numbers(word)[1]) if x.is_cuda else matmul_sell_torch(x, form)


def _product_bitmap(x: Tensor, form: Any, word: str) -> Tensor:
    return matmul_bitmap(x, form, config=word) if x.is_cuda else matmul_bitmap_torch(x, form)


def _scratch_24(x: Tensor, form: tuple[Tensor, ...], word: str) -> Tensor:
    values, index = form
    out = _scratch(len(values), 2 * values.shape[1], x.device)
    return F.linear(x, decompress_24(values, index, out=out) if x.is_cuda else decompress_24_torch(values, index))


def _scratch_sell(x: Tensor, form: Any, word: str) -> Tensor:
    out = _scratch(*form.shape, x.device)
    return F.linear(x, decompress_sell(form, out=out) if x.is_cuda else decompress_sell_torch(form))


def _scratch_bitmap(x: Tensor, form: Any, word: str) -> Tensor:
    out = _scratch(*form.shape, x.device)
    return F.linear(x, decompress_bitmap(form, out=out) if x.is_cuda else decompress_bitmap_torch(form))


def _semi_structured_product(x: Tensor, form: tuple[Tensor], word: str) -> Tensor:
    return F.linear(x, form[0])


def poison_scratch() -> None:
    """What an expansion forgets to write must show in the product."""
    for buffer in _buffers.values():
        buffer.fill_(torch.nan)


BOTH = ("2:4", "any")

CANDIDATES = [
    GpuCandidate("cuBLAS", DENSE, BOTH, _one, _as_dense, _dense_product, "dense"),
    GpuCandidate("mma", OURS, ("2:4",), _kernel_24(configs_24.Mma), _as_24, _product_24, "24"),
    GpuCandidate("gemv", OURS, ("2:4",), _kernel_24(configs_24.Gemv), _as_24, _product_24, "24"),
    GpuCandidate("expand+dot", OURS, ("2:4",), _kernel_24(configs_24.ExpandDot), _as_24, _product_24, "24"),
    GpuCandidate("scratch+cuBLAS", OURS, ("2:4",), _one, _as_24_for_scratch, _scratch_24, "24 for scratch"),
    GpuCandidate("sell", OURS, ("any",), _sell, _as_sell, _product_sell, "sell", _sell_parts),
    GpuCandidate("bitmap", OURS, ("any",), _bitmap, _as_bitmap, _product_bitmap, "bitmap"),
    GpuCandidate("scratch+cuBLAS", OURS, ("any",), _one, _as_bitmap, _scratch_bitmap, "bitmap"),
    GpuCandidate(
        "sell scratch+cuBLAS",
        OURS,
        ("any",),
        _parts_alone,
        _as_sell,
        _scratch_sell,
        "sell for scratch",
        _sell_parts,
    ),
    GpuCandidate(
        "torch CUTLASS",
        TORCH,
        ("2:4",),
        _cutlass,
        _as_semi_structured("CUTLASS"),
        _semi_structured_product,
        "cutlass",
        copied=False,
    ),
    GpuCandidate(
        "torch cuSPARSELt",
        TORCH,
        ("2:4",),
        _cusparselt,
        _as_semi_structured("CUSPARSELT"),
        _semi_structured_product,
        "cusparselt",
        copied=False,
    ),
]


def candidates_for(case: Case, capability: tuple[int, int] | None) -> dict[str, tuple[GpuCandidate, list[str]]]:
    """By name, the candidates that take this case, and their settings, the default first."""
    found = {}
    for candidate in CANDIDATES:
        words = list(candidate.settings(case, capability)) if kind(case.pattern) in candidate.patterns else []
        if words:
            found[candidate.name] = (candidate, words)
    return found
