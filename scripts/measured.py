"""What a piece of work costs this process: wall time, CPU time and memory.

Standard library only, so that every interpreter that is compared can import it, whatever else is installed there.
Linux only: memory is read from /proc.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Measured", "held_memory"]

INTERVAL = 0.05
"""Seconds between two looks at the anonymous memory."""


class Measured:
    """`with Measured() as cost: work()`, then `cost.numbers()`.

    The kernel itself keeps the peak of the resident set (VmHWM); it is set back on entering, so that the peak of the
    work can be told from the peak of the process. A part of the resident set is files that are mapped, such as a
    checkpoint, which the kernel may drop at any time. What is left, the anonymous memory, has no peak counter, so a
    thread looks at it every 50 ms.
    """

    def __enter__(self) -> Measured:
        self._before = _status()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS, see proc_pid_clear_refs(5)
        self._peak_anonymous = self._before["RssAnon"]
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wall, self._cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._done.set()
        self._sampler.join()
        self._after = _status()

    def numbers(self) -> dict[str, float]:
        """Seconds, and bytes: resident before the work, peaks during it, peak of the process until now."""
        return {
            "seconds": self._wall,
            "cpu_seconds": self._cpu,
            "rss_before": self._before["VmRSS"],
            "rss_peak": self._after["VmHWM"],
            "rss_process_peak": max(self._before["VmHWM"], self._after["VmHWM"]),
            "anonymous_before": self._before["RssAnon"],
            "anonymous_peak": self._peak_anonymous,
        }

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL):
            self._peak_anonymous = max(self._peak_anonymous, _status()["RssAnon"])


def held_memory(pid: int) -> int:
    """Anonymous plus shared memory of a process, in bytes: what no file on disk stands behind; 0 when it has ended."""
    try:
        sizes = _status(str(pid))
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)


def _status(pid: str = "self") -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}
