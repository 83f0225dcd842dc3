"""How gpu_check takes times: work is recorded once as a CUDA graph, and its replays are timed between two events.

Launching a small kernel from Python takes longer than running it, so what is timed is the graph, as in a serving
engine. `Laps` does the bookkeeping and knows no GPU: candidates take turns, in changing order, so that a clock that
goes down slows all of them.

A `Device` is the GPU; another one (`Cpu`) has the same methods, for tries of the script without a GPU.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Cpu", "Device", "Gpu", "errors", "laps", "poisoned", "repeats_for", "settings_of_driver"]

Call = Callable[[], object]

FEWEST_CALLS = 20
"""Products in a graph, unless they take long."""

LONG_LAP = 4e-3
"""Seconds of a lap that need no more calls, as soon as each copy of the weight is met."""


class Device(Protocol):
    """Where things are measured."""

    device: torch.device
    cache: int
    capability: tuple[int, int] | None

    def record(self, calls: Sequence[Call], times: int = 1) -> Callable[[], float]:
        """A function that makes all calls in a row, so many times, and gives the seconds of one time."""

    def wait(self) -> None:
        """Until everything is done; raises what went wrong on the way."""

    def free(self) -> int:
        """Bytes that can still be allocated."""

    def peak(self, *, again: bool = False) -> int | None:
        """Most bytes allocated since the last time with `again`; None if it is not known."""


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        self.capability: tuple[int, int] | None = torch.cuda.get_device_capability(self.device)
        self.stream = torch.cuda.Stream(self.device)  # one: cuBLAS keeps a workspace for every stream that it meets

    def record(self, calls: Sequence[Call], times: int = 1) -> Callable[[], float]:
        """See `Device`. Every call is made twice before: kernels are compiled then, and buffers made.

        The second time is for torch.compile, which may compile anew when it meets what the first call changed.
        """
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in 2 * list(dict.fromkeys(calls)):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize(self.device)

        def lap() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(times):
                graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / times

        return lap

    def wait(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize(self.device)

    def free(self) -> int:
        """See `Device`."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak(self, *, again: bool = False) -> int | None:
        """See `Device`."""
        found = int(torch.cuda.max_memory_allocated(self.device))
        if again:
            torch.cuda.reset_peak_memory_stats(self.device)
        return found


class Cpu:
    """The CPU in a GPU's place: nothing is recorded."""

    def __init__(self, *, cache: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device("cpu")
        self.cache, self.clock = cache, clock
        self.capability: tuple[int, int] | None = None

    def record(self, calls: Sequence[Call], times: int = 1) -> Callable[[], float]:
        """See `Device`."""

        def lap() -> float:
            start = self.clock()
            for _ in range(times):
                for call in calls:
                    call()
            return (self.clock() - start) / times

        for call in dict.fromkeys(calls):
            call()
        return lap

    def wait(self) -> None:
        """Nothing is ever under way."""

    def free(self) -> int:
        """Not asked of the system: small tries only."""
        return 2**40

    def peak(self, *, again: bool = False) -> int | None:
        """Not known."""
        return None


def repeats_for(copies: int, seconds: float) -> int:
    """How many times a graph multiplies with each copy, if a product takes so many seconds.

    So that it has 20 calls and a few, or as many as fill a lap if they take long.
    """
    wanted = min(FEWEST_CALLS, math.ceil(LONG_LAP / seconds))
    return max(1, math.ceil(wanted / copies))


def laps(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, in turns; who begins changes from round to round."""
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            found[name].append(runs[name]())
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel forgets to write shows, and an earlier result cannot stand in.

    That belongs to torch's deterministic mode; its warnings about other operations are not for us.
    """
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


def errors(y: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root mean square) error in units of the truth's root mean square; infinite where y is not finite."""
    wrong = (y.double() - truth).abs().nan_to_num(nan=torch.inf)
    scale = truth.square().mean().sqrt().clamp(min=1e-30)
    return float(wrong.max() / scale), float(wrong.square().mean().sqrt() / scale)


def settings_of_driver() -> dict[str, str]:
    """Driver and clocks, as nvidia-smi tells them; nothing where it is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    number = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", 0)
    this = f"GPU-{number}" if number else "0"
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={this}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    words = [word.strip() for word in done.stdout.strip().split(",")]
    return dict(zip(fields, words)) if done.returncode == 0 and len(words) == len(fields) else {}
