"""What `llmprune tune` measured on this machine: one small JSON file for each device and versions of torch and triton.

    {"about": {"device": …, "torch": …, "triton": …, "threads": …}, "may_hold": false,
     "microseconds": {"2:4 bfloat16 4096x4096 50%": {"1": {"kernel": 210.4, "expand": 3920.1, "dense": 380.2}, …}}}

Times hold for a machine and for versions, so both are in the file's name, and another torch begins with an empty file.
A measured weight stands for all of its shape, dtype, pattern and (to a tenth) density.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import UserError
from llmprune.runtime.cpu_build import cache_folder
from llmprune.runtime.weight import SparseWeight

__all__ = ["Timings", "about", "described", "forget", "measured", "may_hold", "store", "timings_file"]


@dataclass(frozen=True)
class Timings:
    """What one file holds.

    microseconds : of each path, by weight (`described`) and number of tokens
    may_hold : whether a weight may be held dense where that was faster
    """

    microseconds: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    may_hold: bool = False


def about(device: torch.device) -> dict[str, Any]:
    """What the times depend on besides the weight."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {"device": name, "torch": torch.__version__, "triton": _triton(), "threads": threads}


def timings_file(device: torch.device) -> Path:
    """Where the times of this device are kept."""
    digest = hashlib.sha256(json.dumps(about(device), sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"timings-{device.type}-torch{torch.__version__}-{digest}.json"


def described(weight: SparseWeight) -> str:
    """The name under which a weight's times are kept, such as "2:4 bfloat16 4096x4096 50%"."""
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{weight.pattern} {dtype} {weight.out_features}x{weight.in_features} {10 * round(10 * weight.density)}%"


def measured(weight: SparseWeight, tokens: int) -> dict[str, float]:
    """Microseconds of each path for such a weight and so many tokens, or the nearest number that was measured."""
    times = _read(weight.device).microseconds.get(described(weight), {})
    if not times:
        return {}
    return times[min(times, key=lambda count: abs(math.log2(int(count)) - math.log2(tokens)))]


def may_hold(device: torch.device) -> bool:
    """Whether whoever tuned this device allowed weights to be held dense."""
    return _read(device).may_hold


def store(device: torch.device, timings: Timings) -> Path:
    """Add to what is known of this device, and take it into use; modules that have run keep the paths they chose.

    The file appears whole or not at all, so that two processes can tune at once.

    Raises
    ------
    UserError
        if it cannot be written.
    """
    known = dict(_read(device).microseconds) | timings.microseconds
    held = {"about": about(device), "may_hold": timings.may_hold, "microseconds": known}
    file = timings_file(device)
    beside = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside.write_text(json.dumps(held, indent=1), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise UserError(
            f"what was measured cannot be kept in {file} ({error.strerror}): let XDG_CACHE_HOME name a folder that you "
            "may write to."
        ) from error
    forget()
    return file


def forget() -> None:
    """Read the files anew when they are next needed."""
    _read.cache_clear()


@cache
def _read(device: torch.device) -> Timings:
    """The file's content; nothing where there is none, or none that can be read (it can be made again)."""
    try:
        held = json.loads(timings_file(device).read_text(encoding="utf-8"))
        return Timings({name: _times(rows) for name, rows in held["microseconds"].items()}, bool(held["may_hold"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Timings()


def _times(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Times by tokens and path as they were read, if they are that: a product asks them without looking twice."""
    return {
        str(max(1, int(tokens))): {path: float(time) for path, time in times.items()} for tokens, times in rows.items()
    }


def _processor() -> str:
    """The processor's name as Linux gives it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
