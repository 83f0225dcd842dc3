"""What every launch of a kernel has to know: whether it is interpreted, which device it goes to, how memory lies.

This module loads triton; the public operations import it and the kernels' files inside functions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    import triton
except ImportError as error:
    raise ImportError(
        "kernels for a GPU need triton, which is there for Linux: pip install triton; "
        "elsewhere the operations whose names end in _torch do the same"
    ) from error

__all__ = ["INTERPRETED", "OPTIONS", "PTX", "aligned", "as_words", "blocks", "check_device", "on_device"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run on the CPU in triton's interpreter. Decided when a kernel's file is imported."""

PTX: bool = not INTERPRETED and torch.version.hip is None
"""Whether kernels may hold instructions of NVIDIA's; else they do the same in portable steps."""


OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. Multiply and add may become one instruction: said here, because triton's default is to change."""


def check_device(tensor: Tensor, operation: str) -> None:
    """Refuse tensors where no kernel can run.

    Raises
    ------
    ValueError : if the tensor is not on a CUDA device (on the CPU, while interpreting)
    """
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise ValueError(
            f"{operation} runs on CUDA devices; got tensors on {tensor.device}: "
            f"move them, or call {operation}_torch, which runs anywhere"
        )


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so make it the tensor's own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, contiguous and beginning at a multiple of 16 bytes, as wide loads want it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def as_words(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes, `aligned`, as integers of this dtype; their number along the last axis must come out even."""
    return aligned(tensor).view(dtype) if tensor.numel() else tensor.new_empty(0, dtype=dtype)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)
