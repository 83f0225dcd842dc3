"""What the processes of one run do together, seen from one of them.

The loop is written once, for a process that has some of the calibration windows and is one of several. This one is
alone: it has all windows, sums are complete as they stand, and nothing is sent. So a plain run changes by no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # the command line answers without torch
    from torch import Tensor

__all__ = ["Team"]

T = TypeVar("T")


class Team:
    """A process alone.

    rank, size : which process of how many this is; rank 0 writes, prints and decides
    neighbours, place : how many processes share this machine, this one included, and which of them this is
    lost : set when a process of the team is gone, so that no one should wait for anything
    safe : tells in a sentence where finished work lies, for whoever has to say that the run was cut off
    """

    rank, size, neighbours, place = 0, 1, 1, 0

    def __init__(self) -> None:
        self.lost = Event()
        self.safe: Callable[[], str] = lambda: ""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, prints and decides."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: neighbours in their order, as many as others have, or one more
        or less."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor (a view may be given) by its sum over the team, the same bits everywhere."""

    def pooled(self, numbers: Tensor) -> Tensor:
        """The sum of a few numbers over the team, where and in which dtype they are."""
        return numbers

    def total(self, *numbers: float) -> list[float]:
        """The sums of counts over the team, exact up to 2^53."""
        return list(numbers)

    def least(self, number: int) -> int:
        """The smallest over the team."""
        return number

    def first(self, *numbers: float | None) -> list[float | None]:
        """Each from the process of lowest rank that has one."""
        return list(numbers)

    def decided(self, decide: Callable[[], T]) -> T:
        """What rank 0 finds when it calls `decide`; every process gets that, or the error that it raised."""
        return decide()

    def send(self, *tensors: Tensor) -> None:
        """Give all processes what rank 0 has in these tensors."""

    def exchange(self, whole: Tensor, cuts: Sequence[tuple[int, int]]) -> None:
        """Fill `whole` (rows, columns), contiguous: of process r all get the rows `cuts[r]`, start and stop."""
