"""From the environment that torchrun and `accelerate launch` set to a team, and from its end to one end of the run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from llmprune.distributed.team import Team

__all__ = ["leave", "rank_in_environment", "team_from_environment", "told_by_others"]

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TOLD = "told_by_others"
"""The attribute of an error that says it, see ending.py."""

TIME_TO_TELL = 5.0
"""Seconds."""

FOREVER = timedelta(days=30)
"""How long a process waits for another one: rank 0 may evaluate for hours while the others wait. That a process is gone
is noticed otherwise, see ending.py."""


def rank_in_environment() -> int | None:
    """This process's rank, if it was started as one of several."""
    several = all(name in os.environ for name in NEEDED) and int(os.environ["WORLD_SIZE"]) > 1
    return int(os.environ["RANK"]) if several else None


@contextmanager
def team_from_environment() -> Iterator[Team]:
    """The team of this process for a `with` block, which all processes leave in the same way.

    One process, under torchrun or not, is a `Team` without a process group. An error that leaves the block in one
    process ends the block in all of them; see `told_by_others`.
    """
    if rank_in_environment() is None:
        yield Team()
        return
    import torch.distributed as dist
    from torch.cuda import is_available
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    from llmprune.distributed.ending import Ending
    from llmprune.distributed.ranks import Ranks

    store, rank, size = next(iter(rendezvous("env://", timeout=FOREVER)))
    store.set_timeout(FOREVER)
    backend = "cpu:gloo,cuda:nccl" if is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=FOREVER)
    neighbours, place = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    team = Ranks(neighbours=max(1, neighbours), place=place)
    ending = Ending(team, PrefixStore("ending", store), FOREVER)
    before = _raise_on_signals()
    try:
        yield team
        ending.farewell()
        for number, handler in before.items():
            signal.signal(number, handler)
    except (Exception, KeyboardInterrupt) as error:
        final = ending.ended_by(error)
        if final is error:
            raise
        raise final from error


def told_by_others(error: BaseException) -> bool:
    """Whether another process says what has happened, so that this one keeps silent.

    An error that came before there was a team is told by rank 0: the others have met the same.
    """
    told: bool = getattr(error, TOLD, (rank_in_environment() or 0) > 0)
    return told


def leave(code: int, error: BaseException) -> NoReturn:
    """End this process after `error`, which has been told.

    One of a team may have threads that wait for connections, around which the interpreter cannot be taken down in
    order. Before there was a team, the others give rank 0 time to tell: torchrun ends all when one has ended.
    """
    if rank_in_environment() is None:
        sys.exit(code)
    if not hasattr(error, TOLD) and told_by_others(error):
        time.sleep(TIME_TO_TELL)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _raise_on_signals() -> dict[signal.Signals, Any]:
    """A signal ends a process of a team by an exception at any time, so that it does not leave without a word.

    Returns the handlers that were there.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        error = KeyboardInterrupt()
        error.code = 128 + number  # type: ignore[attr-defined] # as a shell reports it
        raise error

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
