"""Sparse weights on the CPU: a packed matrix times a few tokens, and a packed matrix made dense.

With one token a matrix product takes as long as reading the matrix, so reading half of it takes half the time. The
kernel (cpu_rows.cpp) reads the packed form as it lies on disk, sparsity/pack.py: nothing is converted at load.

Two operators of torch, so that torch.compile sees them: llmprune::cpu_matmul and llmprune::cpu_expand. They are
compiled on first use; where that is impossible a warning says why, once, and the same operators unpack and call torch.
The plain-torch twins `matmul_torch` and `expand_torch` say what both compute.

Levels of instruction sets, best first: "avx512_bf16" (Zen 4 and Sapphire Rapids on; bfloat16 multiplied in pairs),
"avx512", "avx2". float32, float16 and bfloat16 are added up in float32.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.runtime.cpu_build import CannotBuild, kernel_file
from llmprune.sparsity.pack import ANY, Packed, unpack

__all__ = ["DTYPES", "available", "expand", "expand_torch", "levels", "matmul", "matmul_torch"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of values that the operators take."""

_LIBRARY = torch.library.Library("llmprune", "FRAGMENT")
_LIBRARY.define(
    "cpu_matmul(Tensor x, Tensor values, Tensor index, Tensor? starts, Tensor? bias, *, int in_features, int level=0)"
    " -> Tensor"
)
_LIBRARY.define(
    "cpu_expand(Tensor values, Tensor index, Tensor? starts, Tensor(a!) out, *, int in_features, int level=0) -> ()"
)

_loading = threading.Lock()
_loaded: tuple[str, ...] | None = None


def available() -> str | None:
    """The best level of this machine, or None where sparse weights are unpacked and run dense.

    The first call loads the kernel, and compiles it if that was not done before. Where that fails it warns (once).
    """
    return next(iter(levels()), None)


def levels() -> tuple[str, ...]:
    """All levels that this machine can run, the best first; empty without the kernel."""
    return _load() if _loaded is None else _loaded


def matmul(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    starts: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    level: str | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` with a packed weight.

    Up to eight tokens share one pass over the weight; more take several passes, and `expand` is faster from a few
    passes on. A dropped weight does not exist: NaN or infinity in x at its column does not reach the result.

    Parameters
    ----------
    x : (..., in_features), of the values' dtype or float32
    values : (rows, kept of each row) for N:M or (kept,) for "any", contiguous, one of `DTYPES`
    index : (rows, ⌈in_features / 8⌉), uint8, contiguous; trusted to fit to the values (`llmprune.sparsity.pack.check`)
    starts : (rows + 1,), int64, `row_starts(index)` for "any"; None for N:M
    bias : (rows,), one of `DTYPES`
    level : for tests, one of `levels()`; None takes the best

    Returns
    -------
    (..., rows), of x's dtype. No gradient.
    """
    number = _number(level)
    product = torch.ops.llmprune.cpu_matmul.default
    y: Tensor = product(x, values, index, starts, bias, in_features=in_features, level=number)
    return y


def expand(
    values: Tensor,
    index: Tensor,
    *,
    starts: Tensor | None,
    in_features: int,
    out: Tensor | None = None,
    level: str | None = None,
) -> Tensor:
    """The dense weight (rows, in_features), bit for bit; parameters as in `matmul`.

    out : contiguous memory to put it into; a scratch buffer that is used again saves the time for new pages
    """
    number = _number(level)
    if out is None:
        out = values.new_empty(index.shape[0], in_features)
    torch.ops.llmprune.cpu_expand.default(values, index, starts, out, in_features=in_features, level=number)
    return out


# In plain torch -------------------------------------------------------------------------------------------------------


def matmul_torch(
    x: Tensor, values: Tensor, index: Tensor, *, bias: Tensor | None = None, in_features: int, dtype: torch.dtype
) -> Tensor:
    """What `matmul` computes, in `dtype` (float64 for the truth) and with dropped weights as zeros; (..., rows)."""
    weight = expand_torch(values, index, in_features=in_features)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def expand_torch(values: Tensor, index: Tensor, *, in_features: int, out: Tensor | None = None) -> Tensor:
    """What `expand` computes."""
    return unpack(Packed(values.flatten(), index, ANY, in_features), out)


# Loading --------------------------------------------------------------------------------------------------------------


def _number(level: str | None) -> int:
    """A level as the operators want it; the kernel is loaded by the way."""
    able = levels()
    return 0 if level is None else able.index(level)


def _load_now() -> tuple[str, ...]:
    global _loaded
    with _loading:
        if _loaded is None:
            try:
                torch.ops.load_library(str(kernel_file()))
                _loaded = tuple(torch.ops.llmprune.cpu_levels())
            except (CannotBuild, OSError) as error:
                _LIBRARY.impl("cpu_matmul", _matmul_by_unpacking, "CPU")
                _LIBRARY.impl("cpu_expand", _expand_by_unpacking, "CPU")
                _loaded = ()
                _say_why_not(str(error))  # last: who makes errors of warnings gets one error, and then the results
    return _loaded


_load: Callable[[], tuple[str, ...]] = torch.compiler.disable(_load_now)
"""Building is nothing that torch.compile should look into."""


def _say_why_not(reason: str) -> None:
    warnings.warn(
        f"llmprune's CPU kernel is not used: {reason}. Sparse weights are unpacked and multiplied as dense ones here, "
        "which is right but no faster.",
        RuntimeWarning,
        stacklevel=4,
    )


def _matmul_by_unpacking(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    _starts: Tensor | None,
    bias: Tensor | None,
    *,
    in_features: int,
    level: int = 0,
) -> Tensor:
    return matmul_torch(x, values, index, bias=bias, in_features=in_features, dtype=x.dtype)


def _expand_by_unpacking(
    values: Tensor, index: Tensor, _starts: Tensor | None, out: Tensor, *, in_features: int, level: int = 0
) -> None:
    expand_torch(values, index, in_features=in_features, out=out)


def _shape_of_matmul(x: Tensor, _values: Tensor, index: Tensor, *_others: Tensor | None, **_settings: int) -> Tensor:
    """What torch.compile asks: the result's shape, without computing."""
    return x.new_empty(*x.shape[:-1], index.shape[0])


torch.library.register_fake("llmprune::cpu_matmul", _shape_of_matmul, lib=_LIBRARY)
