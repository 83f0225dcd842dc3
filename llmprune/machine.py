"""The machine: which device computes, what it is good at, and how much memory there is.

Nothing here is imported by merely importing llmprune; torch.cuda is asked only when a device is wanted.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmprune.errors import UserError

__all__ = [
    "compute_dtype",
    "device_named",
    "fits_there",
    "free_bytes",
    "give_back_memory",
    "held_bytes",
    "keep_memory_together",
    "peak_memory",
    "placed",
]

_M_ARENA_MAX = -8  # malloc.h

ROOM_TO_SPARE = 0.8
"""A model is moved to a device whole only if it takes less than this share of the free memory there."""


def device_named(written: str | None, *, place: int | None = None) -> torch.device:
    """The device asked for, if it works; without one the GPU if there is one, else the CPU.

    `place` is this process's number among several on this machine, of which each gets a GPU of its own.

    Raises
    ------
    UserError
        if torch cannot use it, or there is no GPU for this process.
    """
    if place is not None and (written or "cuda").startswith("cuda") and torch.cuda.is_available():
        return _gpu_at(place, written)
    if written is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=written).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        cure = "cuda needs a build of torch for CUDA; " if written.startswith("cuda") and not torch.version.cuda else ""
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {written} cannot be used: {reason}. {cure}--device cpu always works.") from error
    if device.type == "meta":
        raise UserError("--device is one that computes, such as cpu or cuda:1; got meta, which holds shapes only.")
    return device


def _gpu_at(place: int, written: str | None) -> torch.device:
    """The GPU of the process `place`, made the one that torch uses by itself."""
    count = torch.cuda.device_count()
    if written not in (None, "cuda"):
        raise UserError(f"--device {written} is one GPU, and there are several processes: give --device cuda or cpu.")
    if place >= count:
        raise UserError(
            f"there are more processes on this machine than GPUs, of which it has {count}: start one process for each "
            "(--nproc-per-node), or give --device cpu."
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights stored in `dtype` are computed on `device`.

    float32 for 16-bit weights on a CPU without instructions for them, where their products are several times slower.
    """
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return torch.bfloat16 if dtype == torch.bfloat16 and _native_bfloat16() else torch.float32


def _native_bfloat16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def free_bytes(device: torch.device) -> int:
    """Memory that a computation on `device` may still take, in bytes."""
    if device.type == "cuda":  # what torch holds in reserve counts as taken there, and is free for us
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory that this process has held so far, in bytes: of the host, and of `device` if it is a GPU."""
    peak = {"cpu": _peak_of_process()}
    if device.type == "cuda":
        peak[str(device)] = torch.cuda.max_memory_allocated(device)
    return peak


def held_bytes() -> int:
    """Memory that this process holds and no file stands behind, in bytes; all of it where that cannot be told apart."""
    status = Path("/proc/self/status")
    if status.exists():
        sizes = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", status.read_text(encoding="utf-8")))
        return 1024 * (int(sizes.get("RssAnon", 0)) + int(sizes.get("RssShmem", 0)))
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux begins with the memory of the process that started this one
        peaks = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if peaks:
            return 1024 * int(peaks[0])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_memory_together() -> None:
    """Ask the C library for a single heap; for the start of a process of our own, before threads have theirs.

    glibc gives every thread its own heap, and what is free in one cannot be used in another. Pruning SmolLM2-135M held
    300 MB more that way. Elsewhere than on glibc nothing happens.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Return what is free on the heap to the system, which glibc does not do by itself."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def fits_there(device: torch.device, nbytes: int) -> bool:
    """Whether so much fits on `device` with room to spare."""
    return nbytes <= ROOM_TO_SPARE * free_bytes(device)


@contextmanager
def placed(model: nn.Module, device: torch.device, *, beside: int = 0) -> Iterator[bool]:
    """The whole model on `device` for a `with` block, if it fits there with room to spare; then where it was.

    Parameters
    ----------
    beside : bytes that the block will hold there besides the model

    Yields
    ------
    whether the model is on `device`
    """
    home = next(model.parameters()).device
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device == home or not fits_there(device, size + beside):
        yield device == home
        return
    model.to(device)
    try:
        yield True
    finally:
        model.to(home)
