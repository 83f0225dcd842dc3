"""One of several processes, over torch.distributed.

Two backends in one group: tensors on a GPU go through NCCL, and tensors on the CPU, all small decisions among them,
through gloo, so that deciding never waits for a GPU. Sums come out of one all-reduce and so are the same bits on every
rank; their order depends on the number of processes alone.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmprune.distributed.launch import TOLD
from llmprune.distributed.team import Team
from llmprune.errors import LlmpruneError, LostProcess

__all__ = ["Ranks"]

T = TypeVar("T")

NONE = float("nan")


class Ranks(Team):
    """A process of the default process group, which has been set up.

    Every method is a collective: all processes call it, in the same order.

    Raises
    ------
    LostProcess
        from every method, if a process is gone.
    """

    def __init__(self, *, neighbours: int, place: int) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.neighbours, self.place = neighbours, place

    def add(self, *tensors: Tensor) -> None:
        with _peers():
            for tensor in tensors:
                dense = tensor.contiguous()  # a strip of a triangle is not
                dist.all_reduce(dense)
                if dense is not tensor:
                    tensor.copy_(dense)

    def pooled(self, numbers: Tensor) -> Tensor:
        summed = numbers.clone()
        self.add(summed)
        return summed

    def total(self, *numbers: float) -> list[float]:
        summed: list[float] = self.pooled(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return summed

    def least(self, number: int) -> int:
        lowest = torch.tensor(number)
        with _peers():
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return int(lowest)

    def first(self, *numbers: float | None) -> list[float | None]:
        mine = torch.tensor([NONE if number is None else number for number in numbers], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with _peers():
            dist.all_gather(everyone, mine)
        columns = torch.stack(everyone).T.tolist()
        return [next((number for number in column if number == number), None) for column in columns]

    def decided(self, decide: Callable[[], T]) -> T:
        if self.leads:
            try:
                outcome: T = decide()
            except (LlmpruneError, KeyboardInterrupt) as error:
                self._tell(_light(error))
                raise
            self._tell(outcome)
            return outcome
        told = self._hear()
        if isinstance(told, BaseException):
            setattr(told, TOLD, True)
            raise told
        result: T = told
        return result

    def send(self, *tensors: Tensor) -> None:
        with _peers():
            for tensor in tensors:
                dense = tensor.contiguous()
                dist.broadcast(dense.view(-1).view(torch.uint8), src=0)
                if dense is not tensor:
                    tensor.copy_(dense)

    def exchange(self, whole: Tensor, cuts: Sequence[tuple[int, int]]) -> None:
        raw = whole.view(torch.uint8) if whole.dtype == torch.bool else whole  # gloo knows no bool
        with _peers():
            for rank, (start, stop) in enumerate(cuts):
                if start < stop:
                    dist.broadcast(raw[start:stop], src=rank)

    def _tell(self, what: Any) -> None:
        """Send an object of ours to all. It came from this very run, so unpickling it is safe."""
        buffer = io.BytesIO()
        pickle.dump(what, buffer)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        with _peers():
            dist.broadcast(torch.tensor(len(content)), src=0)
            dist.broadcast(content, src=0)

    def _hear(self) -> Any:
        size = torch.tensor(0)
        with _peers():
            dist.broadcast(size, src=0)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(content, src=0)
        return pickle.loads(content.numpy().tobytes())


def _light(error: BaseException) -> BaseException:
    """The same error without a result, which may hold a model."""
    same = copy.copy(error)
    vars(same).pop("result", None)
    return same


@contextmanager
def _peers() -> Iterator[None]:
    """A collective that fails has lost a process, unless this one is out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcess from error
