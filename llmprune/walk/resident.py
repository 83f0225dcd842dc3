"""One layer at a time on the device that computes, in the dtype that computes well there.

A 16-bit checkpoint is computed in float32 on a CPU without instructions for it, where 16-bit products are several
times slower. Going up to float32 and back is exact for every weight that the walk leaves alone, and the walk rounds
the others to the checkpoint's dtype as it replaces them, so nothing changes on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["compute_dtype", "free_bytes", "resident"]


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer stored in `dtype` is computed on `device`."""
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return torch.bfloat16 if dtype == torch.bfloat16 and _native_bfloat16() else torch.float32


def _native_bfloat16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


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


def free_bytes(device: torch.device) -> int:
    """Memory that a computation on `device` may still take, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
