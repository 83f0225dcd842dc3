"""The module that stands in place of nn.Linear when its weight is packed.

It holds the packed tensors as they are on disk and hands each product to the path that `dispatch` chose for so many
tokens. What a path needs besides (where rows begin, index words for tensor cores) is made at the first product and
made anew when the tensors are replaced or moved.

It computes no gradients: packed weights are for inference.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import UserError
from llmprune.runtime.dispatch import path_for
from llmprune.runtime.weight import SparseWeight
from llmprune.sparsity.pack import Packed, unpack

__all__ = ["SparseLinear"]

_handles = itertools.count()
_modules: weakref.WeakValueDictionary[int, SparseLinear] = weakref.WeakValueDictionary()
"""Every SparseLinear by its handle: torch.compile passes tensors and numbers to an operator, but no module."""


class SparseLinear(nn.Module):
    """y = x Wᵀ + b, with W (out_features, in_features) packed.

    Parameters
    ----------
    pattern : "2:4" or another N:M, or "any"
    kept : stored values
    input_axis : which axis of the weight was over the inputs where it was stored dense: 1, or 0 for GPT-2's `Conv1D`

    Attributes
    ----------
    weight : the kept values, (out_features, in_features · n / m) for N:M, (kept,) for "any"
    weight_index : (out_features, ⌈in_features / 8⌉) uint8, the bitmap of what is kept
    bias : (out_features,) or None
    """

    weight: nn.Parameter
    weight_index: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pattern: str,
        kept: int,
        bias: bool = True,
        input_axis: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.input_axis = pattern, input_axis
        shape = (kept,) if pattern == "any" else (out_features, kept // out_features if out_features else 0)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        index = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("weight_index", index)
        empty_bias = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty_bias, requires_grad=False) if bias else None
        self._begin()

    @classmethod
    def from_packed(cls, packed: Packed, bias: Tensor | None = None, *, input_axis: int = 1) -> SparseLinear:
        """A module around tensors that are packed already; nothing is copied."""
        made = cls(
            packed.in_features,
            packed.rows,
            pattern=packed.pattern,
            kept=packed.values.numel(),
            bias=bias is not None,
            input_axis=input_axis,
            dtype=packed.values.dtype,
            device="meta",
        )
        made.weight = nn.Parameter(packed.values, requires_grad=False)
        made.weight_index = packed.index
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made

    def packed(self) -> Packed:
        """The weight as tensors; nothing is copied."""
        return Packed(self.weight.data, self.weight_index, self.pattern, self.in_features)

    def dense(self) -> Tensor:
        """The weight as (out_features, in_features), in new memory."""
        return unpack(self.packed())

    def _begin(self) -> None:
        """Forget what was derived from the tensors, and take a handle of its own."""
        self._handle = next(_handles)
        _modules[self._handle] = self
        self._forget()

    def _forget(self) -> None:
        """Let go of the tensors and of all that was derived from them."""
        self._source: Tensor | None = None
        self._weight: SparseWeight | None = None
        self._paths: list[Callable[[Tensor], Tensor] | None] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one read back, is another module: it shares nothing that was derived."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        """What makes the module, without what is derived: paths are closures, and would take tensors with them."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_source", "_paths", "_weight")}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in the dtype of x, which is the weight's (or autocast makes it so).

        Raises
        ------
        UserError
            if a gradient is wanted.
        """
        if torch.compiler.is_compiling():
            x = self._fitting(x)  # here, because autocast does not reach into an operator
            product: Tensor = torch.ops.llmprune.sparse_linear(x, self.weight, self.weight_index, self._handle)
            return product
        y = self.multiply(x)
        if "_hf_hook" in self.__dict__ and _is_offloaded(self._hf_hook):
            self._forget()
        return y

    def multiply(self, x: Tensor) -> Tensor:
        """The product itself: what a decode step calls for every linear, so it looks up and does nothing else."""
        weight = self._parameters.get("weight")
        if weight is None:  # in a replica of DataParallel it is a plain attribute
            weight = self.weight
        if weight is not self._source:
            self._prepare()
        if x.dtype is not self._dtype or x.shape[-1] != self.in_features or x.requires_grad or weight.requires_grad:
            x = self._fitting(x)
        tokens = x.numel() // self.in_features if self.in_features else x.shape[:-1].numel()
        path = self._paths[(tokens - 1).bit_length()]
        if path is None or not tokens:
            return self._first(x, tokens)
        return path(x)

    def _prepare(self) -> None:
        weight = self.weight
        self._weight = SparseWeight(self.packed(), self.bias)
        self._paths = [None] * 64
        self._dtype = weight.dtype
        self.__dict__["_source"] = weight  # past nn.Module, which would make it a second parameter

    def _fitting(self, x: Tensor) -> Tensor:
        """x as the paths want it, or an error."""
        if (x.requires_grad or self.weight.requires_grad) and torch.is_grad_enabled():
            what = "an input that requires one" if x.requires_grad else "requires_grad=True"
            raise UserError(
                f"a packed weight computes no gradients; got {what}. Run the model under "
                "torch.inference_mode(), or train the dense model (model.dequantize(), or llmprune unpack)."
            )
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"x must be (..., {self.in_features}); got {tuple(x.shape)}")
        dtype = self.weight.dtype
        if x.dtype is dtype:
            return x
        if torch.is_autocast_enabled(x.device.type):
            return x.to(dtype)
        raise RuntimeError(f"x must be of the weight's dtype {dtype}; got {x.dtype}")

    def _first(self, x: Tensor, tokens: int) -> Tensor:
        """The first product with so many tokens: decide on a path, and keep it for the next ones."""
        if not tokens:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if x.device != self.weight.device:
            raise RuntimeError(f"x must be on the weight's device {self.weight.device}; got {x.device}")
        assert self._weight is not None
        path = path_for(self._weight, tokens)
        self._paths[(tokens - 1).bit_length()] = path
        return path(x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """`load_state_dict` writes into the tensors in place, which nothing else shows."""
        super()._load_from_state_dict(*args, **kwargs)
        self._begin()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        """`.to()`, `.cuda()` and the like: what was derived stays behind."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._begin()
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        kept = self.weight.numel() / max(1, self.in_features * self.out_features)
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shown}, pattern={self.pattern}, kept={kept:.0%}"


def _is_offloaded(hook: Any) -> bool:
    """Whether accelerate brings a module's tensors for each forward only and takes them away after it."""
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))


@torch.library.custom_op("llmprune::sparse_linear", mutates_args=())
def _sparse_linear(x: Tensor, values: Tensor, index: Tensor, handle: int) -> Tensor:
    """The product as one operator, for torch.compile: which path it takes is decided when it runs."""
    return _modules[handle].multiply(x)


@_sparse_linear.register_fake
def _(x: Tensor, values: Tensor, index: Tensor, handle: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], index.shape[0])
