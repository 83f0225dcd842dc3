"""One dense buffer for all layers: a packed weight is expanded into it, multiplied, and overwritten by the next.

A model whose linears take turns needs the memory of its largest weight and not of all of them. Each thread has its
own buffers, and on a GPU each stream: two products at the same time would otherwise overwrite each other.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["release", "scratch"]


class _Buffers(threading.local):
    """Of the thread that asks: one buffer for each dtype, device and stream."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}


_buffers = _Buffers()


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this shape, uninitialised, valid until the next call in this thread (and stream).

    While a CUDA graph is captured the memory comes from the graph's own pool: a graph that is replayed later must not
    write to a buffer that has been replaced by a larger one since.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=dtype, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    size = shape[0] * shape[1]
    held = _buffers.held
    buffer = held.get((dtype, device, stream))
    if buffer is None or buffer.numel() < size:
        held.pop((dtype, device, stream), None)  # the smaller one goes first
        with torch.inference_mode(False):  # what inference mode makes could not be written to outside of it
            buffer = held[dtype, device, stream] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def release() -> None:
    """Give this thread's buffers back."""
    _buffers.held.clear()
