"""Stopping a long run so that it can go on: the first SIGINT or SIGTERM asks, the second does not wait.

A run that is asked to stop finishes the layer that it is at, writes its safe point and leaves with the exit code that
a shell expects of that signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Stop", "Stopped", "stoppable"]

_SHELL = 128
"""A shell reports a process that signal N ended with 128 + N."""


class Stopped(KeyboardInterrupt):
    """A run was left on request.

    code : the exit code
    saved : where the finished model is, if it was saved already
    safe : a sentence that says where the safe point is, if there is one
    """

    def __init__(self, code: int, *, saved: str = "") -> None:
        super().__init__(saved)
        self.code, self.safe = code, ""


class Stop:
    """Whether somebody has asked to stop, and by which signal.

    `patient` tells whether there is a safe point worth waiting for; where not, the first signal ends the run at once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.patient: Callable[[], bool] = lambda: False
        self.code: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        again, self.code = self.code is not None, _SHELL + number
        if again or not self.patient():
            raise Stopped(self.code)
        with suppress(RuntimeError):  # the program may be in the middle of printing, which cannot be done twice at once
            self.say("Stopping after this layer. Once more stops at once.")


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[Stop]:
    """Listen to SIGINT and SIGTERM for a `with` block, where that is possible: in a process's main thread.

    A signal that the process was told to ignore stays ignored, as in a job in the background.
    """
    stop = Stop(say)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
