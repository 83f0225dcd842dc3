"""Where a layer multiplies activations with its parameters.

Models spell a linear in many ways: `nn.Linear`, GPT-2's `Conv1D` (`addmm` with the transpose), experts as slices of a
3-D parameter, `@`. Hooks on module classes miss most of them. `Products` looks at the operation itself: whenever an
operand of a product lies in the storage of a watched parameter, it tells which one, which expert's slice, which way
round it is stored, and what it is multiplied with. A parameter that is cast or copied before its product lies in
another storage and is not seen; the survey reports it as out of reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Product", "Products", "WeightKey"]

OPERANDS = {
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
"""Positions of the left and the right factor among an operation's arguments. `linear` is apart: its weight is stored
as (out_features, in_features), all others multiply with (in_features, out_features)."""

KEYWORDS = {"left": ("input", "mat1", "batch1", "self"), "right": ("weight", "mat2", "batch2", "other")}

ALL = -1
"""The expert index of a product that takes every expert of a 3-D parameter at once."""


@dataclass(frozen=True)
class WeightKey:
    """Names one weight of a layer: a parameter (relative to the layer), and which expert of a 3-D one."""

    parameter: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"


@dataclass(frozen=True)
class Product:
    """A product of activations with a weight.

    key : which weight; `expert` is `ALL` where all experts are multiplied at once
    weight : a view on the parameter, (out_features, in_features), or (experts, out_features, in_features)
    inputs : (tokens, in_features), or (experts, tokens, in_features)
    """

    key: WeightKey
    weight: Tensor
    inputs: Tensor


class Products(TorchFunctionMode):
    """Calls `meet(product)` before every product with one of `parameters`.

    Parameters
    ----------
    parameters : (name, parameter) pairs, 2-D matrices or 3-D stacks of matrices
    meet : called with the mode off; may switch away to another coroutine, see lockstep.py
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], meet: Callable[[Product], None]) -> None:
        super().__init__()
        self.watched = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters}
        self.meet = meet

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear" or name in OPERANDS:
            product = self._product(name, args, kwargs)
            if product is not None:
                self.meet(product)
        return func(*args, **kwargs)

    def _product(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Product | None:
        at = OPERANDS.get(name, (0, 1))
        left, right = _factor(args, kwargs, at[0], "left"), _factor(args, kwargs, at[1], "right")
        if left is None or right is None:
            return None
        if (found := self._find(right)) is not None:
            return self._describe(found, right if name == "linear" else right.mT, left)
        if name != "linear" and (found := self._find(left)) is not None:
            return self._describe(found, left, right.mT if right.ndim > 1 else right)
        return None

    def _find(self, factor: Tensor) -> tuple[str, Tensor] | None:
        if factor.ndim < 2 or type(factor) not in (Tensor, torch.nn.Parameter):
            return None
        return self.watched.get(factor.untyped_storage().data_ptr())

    def _describe(self, found: tuple[str, Tensor], weight: Tensor, inputs: Tensor) -> Product | None:
        name, parameter = found
        expert = _which_expert(parameter, weight)
        if weight.numel() != parameter.numel() and expert is None:
            return None  # a part of a matrix, such as a slice of rows: the survey counts the parameter as out of reach
        if weight.ndim == 2:
            return Product(WeightKey(name, expert), weight, inputs.reshape(-1, weight.shape[-1]))
        stacked = inputs.expand(len(weight), *inputs.shape[-2:])
        return Product(WeightKey(name, ALL), weight, stacked)


def _factor(args: Sequence[Any], kwargs: dict[str, Any], position: int, side: str) -> Tensor | None:
    value = args[position] if position < len(args) else next((kwargs[k] for k in KEYWORDS[side] if k in kwargs), None)
    return value if isinstance(value, Tensor) else None


def _which_expert(parameter: Tensor, weight: Tensor) -> int | None:
    """The index of the slice of a 3-D `parameter` that `weight`, a matrix in its storage, is; None if it is none."""
    if parameter.ndim != 3 or weight.ndim != 2 or weight.numel() != parameter[0].numel():
        return None
    index, rest = divmod(int(weight.storage_offset()) - int(parameter.storage_offset()), int(parameter.stride(0)))
    return index if rest == 0 else None
