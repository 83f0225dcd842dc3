"""Whoever asks a packed model for a gradient is told that there is none, and what to do.

Nothing in it requires a gradient, so torch would only miss a `grad_fn`. Where gradients are enabled, what the model
returns gets one whose backward pass says it in words; under `torch.no_grad()` and while compiling nothing happens.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import UserError

__all__ = ["refuse_backward"]


def refuse_backward(_model: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook: the model's own output, each tensor of floats with a backward pass that raises UserError."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if isinstance(output, MutableMapping):  # transformers' ModelOutput
        for name, value in output.items():
            output[name] = _refusing(value)
        return output
    return tuple(_refusing(value) for value in output) if isinstance(output, tuple) else _refusing(output)


def _refusing(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return _Refusing.apply(value, torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call] # torch's own


class _Refusing(torch.autograd.Function):
    """Hands a tensor on. The second argument requires a gradient, and so the result does."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, _anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UserError(
            "a packed model computes no gradients; got a backward pass. Train the dense model: model.dequantize(), or "
            "llmprune unpack."
        )
