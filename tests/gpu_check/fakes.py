"""Cases, times and a device that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["FakeDevice", "case", "measured"]


def case(gpu: SimpleNamespace, pattern: str = "2:4", tokens: int = 1, shape: tuple[int, int] = (64, 128)) -> Any:
    return gpu.kernel_benchmarks.Case(*shape, pattern, tokens)


class FakeDevice:
    """A CPU whose time is what a function of the first call says."""

    device, cache, capability = torch.device("cpu"), 1, (9, 0)

    def __init__(self, seconds: Callable[[], float] = lambda: 1e-5) -> None:
        self.seconds, self.broken = seconds, False

    def record(self, calls: Sequence[Callable[[], object]], times: int = 1) -> Callable[[], float]:
        calls[0]()
        each = self.seconds()
        return lambda: each * len(calls)

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    def free(self) -> int:
        return 2**40

    def peak(self, *, again: bool = False) -> int | None:
        return None


def measured(gpu: SimpleNamespace, way: str, role: str = "ours", microseconds: float = 1.0) -> Any:
    """One candidate, timed three times."""
    return gpu.rows.Measured(way, role, rounds=[microseconds] * 3)
