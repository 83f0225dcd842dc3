"""How fast this machine is at what a run does: two seconds of measuring, on matrices of the model's own shapes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Speed", "measure"]

SECONDS = 0.4
"""Of each of the five measurements."""

MOST = 2048
"""Sides of the matrices that are measured with: more takes longer and tells no more."""


@dataclass(frozen=True)
class Speed:
    """What the machine does in a second.

    forward : floating-point operations of products in the dtype that layers are computed in
    products, factorings : of products and of Cholesky factors in float32
    moved : bytes that element-wise operations read and write
    calls : operations on next to nothing
    digested : bytes of SHA-256
    """

    forward: float
    products: float
    factorings: float
    moved: float
    calls: float
    digested: float


def measure(device: torch.device, dtype: torch.dtype, *, tokens: int, hidden: int, inner: int) -> Speed:
    """Measure for about two seconds.

    Parameters
    ----------
    tokens : of one batch; hidden, inner : sides of the model's largest matrices
    """
    tokens, hidden, inner = (min(size, MOST) for size in (tokens, hidden, inner))
    inputs = torch.randn(tokens, hidden, device=device).to(dtype)
    weight = torch.randn(inner, hidden, device=device).to(dtype)
    square, wide = torch.randn(hidden, hidden, device=device), torch.randn(hidden, inner, device=device)
    positive = square @ square.T + hidden * torch.eye(hidden, device=device)
    many, few = torch.randn(2**24, device=device), torch.randn(8, device=device)
    data = bytes(2**22)

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / _seconds(work, device)

    return Speed(
        forward=rate(2.0 * tokens * hidden * inner, lambda: torch.nn.functional.linear(inputs, weight)),
        products=rate(2.0 * hidden * hidden * inner, lambda: square @ wide),
        factorings=rate(hidden**3 / 3, lambda: torch.linalg.cholesky_ex(positive)),
        moved=rate(12.0 * len(many), lambda: many * many + many) * 2,
        calls=rate(1.0, lambda: few * few),
        digested=rate(len(data), lambda: hashlib.sha256(data).digest()),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one run of `work`, the mean over about `SECONDS`; the first run, which warms up, does not count."""
    work()
    _wait(device)
    start, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS or not times:
        work()
        times += 1
        if times & (times - 1) == 0:
            _wait(device)
    _wait(device)
    passed = time.perf_counter() - start
    return passed / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
