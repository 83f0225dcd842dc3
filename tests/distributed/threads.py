"""A team of threads in one process: what processes exchange, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from llmprune.distributed import Team

__all__ = ["in_threads"]

T = TypeVar("T")


class _Thread(Team):
    def __init__(self, rank: int, size: int, shared: _Shared) -> None:
        super().__init__()
        self.rank, self.size, self.shared = rank, size, shared

    def pooled(self, numbers: Tensor) -> Tensor:
        everyone = self.shared.gather(self.rank, numbers)
        return sum(everyone[1:], everyone[0])

    def exchange(self, whole: Tensor, cuts: Sequence[tuple[int, int]]) -> None:
        for (start, stop), other in zip(cuts, self.shared.gather(self.rank, whole.clone())):
            whole[start:stop] = other[start:stop]


class _Shared:
    def __init__(self, size: int) -> None:
        self.board: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.board[rank] = value
        self.barrier.wait()
        found = list(self.board)
        self.barrier.wait()
        return found


def in_threads(size: int, work: Callable[[Team], T]) -> list[T]:
    """What `work` gives in each of a team of threads. One that ends before the others is found out by them."""
    shared = _Shared(size)
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(work, _Thread(r, size, shared)) for r in range(size)]]
