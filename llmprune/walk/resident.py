"""One layer at a time on the device that computes, in the dtype that computes well there.

A 16-bit checkpoint is computed in float32 on a CPU without instructions for it (machine.py). Going up to float32 and
back is exact for every weight that the walk leaves alone, and the walk rounds the others to the checkpoint's dtype as
it replaces them, so nothing changes on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["resident"]


@contextmanager
def resident(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, torch.dtype]]:
    """Hold `layer` on `device` for a `with` block, its 16-bit tensors in `dtype`; afterwards all is where it was.

    Parameters keep their identity and their ties. Yields the dtype in which each parameter is stored.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    homes = [(tensor, tensor.device, tensor.dtype) for tensor in tensors]
    stored = {name: parameter.dtype for name, parameter in layer.named_parameters(remove_duplicate=False)}
    try:
        _move(tensors, [(device, dtype if _is_half(tensor) else tensor.dtype) for tensor in tensors])
        yield stored
    finally:
        _move([tensor for tensor, _, _ in homes], [(home, kind) for _, home, kind in homes])


def _move(tensors: list[Tensor], places: list[tuple[torch.device, torch.dtype]]) -> None:
    moved: dict[tuple[int, ...], Tensor] = {}
    for tensor, (device, dtype) in zip(tensors, places, strict=True):
        if (tensor.device, tensor.dtype) == (device, dtype):
            continue
        key = (tensor.data_ptr(), tensor.storage_offset(), *tensor.shape, *tensor.stride())
        if key not in moved:
            moved[key] = tensor.data.to(device, dtype)
        tensor.data = moved[key]


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
