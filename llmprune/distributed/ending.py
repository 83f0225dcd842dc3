"""All processes of a run end as one: for the first reason that any of them has, which is told once.

Whoever ends early writes its reason into the store that the group was made with; the first one counts. Then it closes
its connections, and that is what rank 0 notices: it waits, in a thread for each, for the farewell of all others, and
these wait for its own. Such waiting ends at once when a connection does, by an error or by SIGKILL, whatever the main
thread is doing: it may be deep in a solve, or in a collective of NCCL that will never come back. It gets a little time
to end by itself, with its own clean-up.

Rank 0 tells the reason and says farewell with an exit code. Only if it was lost without one, another process tells.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmprune.distributed.launch import TOLD
from llmprune.distributed.team import Team
from llmprune.errors import LlmpruneError, LostProcess

__all__ = ["Ending"]

GRACE = 5.0
"""Seconds that a process has to end by itself when another one is gone."""

PAUSE = 1.0
"""Seconds after a signal in which a lost process may come to light: launchers answer a loss with signals."""

AGAIN = "The same command goes on from the last safe point, if there is one."


@dataclass(frozen=True)
class Outcome:
    """Why a run ended early.

    rank : of the process that says so
    kind : "error" (one of ours), "fault" (a traceback), "stopped" (a signal) or "lost" (a process is gone)
    code : exit code
    """

    rank: int
    kind: str
    text: str
    code: int


class Ending:
    """How the process of `team` ends together with the others.

    Parameters
    ----------
    store : a `torch.distributed.Store` for the outcome, shared by all
    forever : longer than any run
    """

    def __init__(self, team: Team, store: Any, forever: timedelta) -> None:
        self.team, self.store = team, store
        self.bond = dist.new_group(backend="gloo", timeout=forever)
        self._over = threading.Event()
        self._farewell = 0  # the exit code that rank 0 has told
        self.peers = range(1, team.size) if team.leads else range(1)
        self.threads = [threading.Thread(target=self._wait_for, args=(peer,), daemon=True) for peer in self.peers]
        for thread in self.threads:
            thread.start()

    def farewell(self) -> None:
        """All is done: wait for all, and let go of each other. Raises LostProcess."""
        self.team.total(0)
        self._say_farewell(0)
        for thread in self.threads:
            thread.join()
        dist.destroy_process_group()

    def ended_by(self, error: BaseException) -> BaseException:
        """Make this process's error known and find out which one counts: the exception to leave with."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the end has come; the reason must still be told
        if getattr(error, TOLD, False):  # rank 0's own, that it has shared: wait for its farewell
            self.team.lost.wait(GRACE)
            self._over.set()
            return error
        if isinstance(error, KeyboardInterrupt | LostProcess):
            self.team.lost.wait(PAUSE)
        mine = self._outcome_of(error)
        outcome = self._settle(mine)
        self._over.set()
        if outcome == mine and outcome.kind == "fault":
            final, tells = error, True  # by its traceback
        else:
            final, tells = _final(error, mine, outcome), self._tells(outcome)
        if tells and outcome.kind == "lost" and not self.team.leads:
            final = LostProcess(f"{outcome.text} {AGAIN}")
        setattr(final, TOLD, not tells)
        if self.team.leads:
            self._say_farewell(outcome.code)
        return final

    def _say_farewell(self, code: int) -> None:
        for peer in self.peers:
            with suppress(RuntimeError):  # it may be the one that is gone
                dist.send(torch.tensor([float(code)]), peer, group=self.bond)

    def _wait_for(self, peer: int) -> None:
        """The thread that notices when `peer` is gone."""
        code = torch.ones(1)
        try:
            dist.recv(code, peer, group=self.bond)
            if not code:
                return
            self._farewell = int(code)
        except RuntimeError:
            pass
        outcome = self._settle(Outcome(self.team.rank, "lost", str(LostProcess()), 2))
        self.team.lost.set()
        if not self._over.wait(GRACE):
            self._end_at_once(outcome)

    def _end_at_once(self, outcome: Outcome) -> None:
        """The main thread does not come back: do without it."""
        if self._tells(outcome):
            where = (self.team.safe() if self.team.leads else AGAIN) if outcome.kind == "lost" else ""
            sys.stderr.write(f"Error: {' '.join(filter(None, (outcome.text, where)))}\n")
            sys.stderr.flush()
        os._exit(outcome.code)

    def _outcome_of(self, error: BaseException) -> Outcome:
        rank = self.team.rank
        if isinstance(error, KeyboardInterrupt):
            return Outcome(rank, "stopped", "", getattr(error, "code", 130))
        if isinstance(error, LostProcess):
            return Outcome(rank, "lost", str(LostProcess()), 2)
        if isinstance(error, LlmpruneError):
            return Outcome(rank, "error", str(error), 2)
        return Outcome(rank, "fault", f"process {rank} of {self.team.size} failed: {type(error).__name__}: {error}", 1)

    def _settle(self, mine: Outcome) -> Outcome:
        """The first outcome of the run, which may be this one."""
        if self._farewell:
            kind = {1: "fault", 2: "error"}.get(self._farewell, "stopped")
            return Outcome(0, kind, "the run has ended.", self._farewell)
        try:
            first = self.store.compare_set("outcome", "", json.dumps(asdict(mine)))
        except RuntimeError:  # the store is gone with the process that held it
            return mine
        return Outcome(**json.loads(first))

    def _tells(self, outcome: Outcome) -> bool:
        """Whether it is this process that says what has happened."""
        if outcome.kind == "fault" or self._farewell:
            return False  # the traceback says it, or rank 0 has
        if not self.team.leads:
            own = outcome.rank == self.team.rank and outcome.kind != "lost"
            if own or not self.team.lost.wait(GRACE) or self._farewell:
                return False  # rank 0 is there, or hears of it when this process is gone; or it has told by now
        try:
            return bool(self.store.compare_set("told", "", str(self.team.rank)) == str(self.team.rank).encode())
        except RuntimeError:
            return self.team.rank <= 1


def _final(error: BaseException, mine: Outcome, outcome: Outcome) -> BaseException:
    """What a process leaves with that raised `error`, which would be the outcome `mine`, when `outcome` counts."""
    if (outcome.kind, outcome.text) == (mine.kind, mine.text):
        return error
    if outcome.kind == "stopped":
        interrupt = error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
        interrupt.code = outcome.code  # type: ignore[attr-defined]
        return interrupt
    if outcome.kind == "lost":
        safe = getattr(error, "safe", "")
        return error if isinstance(error, LostProcess) else LostProcess(" ".join(filter(None, (outcome.text, safe))))
    return LlmpruneError(outcome.text)
