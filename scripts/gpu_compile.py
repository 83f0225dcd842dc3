"""Compiles kernels ahead, in several processes: one process would need longer for that than for all timings.

Triton keeps what it compiled on disk, so it is enough that some process has launched a kernel once. Run as a program
it reads jobs (JSON) from standard input and launches each on a weight of few rows; what fails there will fail again
where it is timed, and is reported from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from gpu_candidates import CANDIDATES, candidates_for
from gpu_rows import OURS, kind
from gpu_weights import DTYPE, Weight
from kernel_benchmarks import Case

__all__ = ["compile_ahead", "jobs"]

Job = tuple[int, str, int, str, str]
"""(columns, pattern, tokens, name of a candidate, word)"""

ROWS = 512
"""Enough for every tile, and a multiple of whatever triton distinguishes numbers by."""

MOST_PROCESSES = 12


def jobs(cases: Sequence[Case], capability: tuple[int, int] | None) -> list[Job]:
    """One for each kernel that tuning or timing these cases may launch."""
    found: dict[Job, None] = {}
    for case in cases:
        for name, (way, words) in candidates_for(case, capability).items():
            if way.role == OURS:
                found |= dict.fromkeys((case.columns, case.pattern, case.tokens, name, word) for word in words)
    return list(found)


def compile_ahead(todo: Sequence[Job], seconds: float) -> tuple[int, float]:
    """Share the jobs among processes, stop them after so many seconds; returns (processes, seconds that it took)."""
    began = time.perf_counter()
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1, len(todo)))
    command = [sys.executable, str(Path(__file__).resolve())]
    running = []
    for i in range(count):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(todo[i::count]))
        process.stdin.close()
        running.append(process)
    for process in running:
        try:
            process.wait(max(0.1, seconds - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return count, time.perf_counter() - began


def _launch(job: Job) -> None:
    columns, pattern, tokens, name, word = job
    device = torch.device("cuda")
    weight = Weight(Case(ROWS, columns, pattern, tokens), device)
    x = torch.zeros(tokens, columns, dtype=DTYPE, device=device)
    way = next(way for way in CANDIDATES if way.name == name and kind(pattern) in way.patterns)
    way.product(x, way.form(weight, word), word)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        with suppress(Exception):
            _launch(tuple(each))
