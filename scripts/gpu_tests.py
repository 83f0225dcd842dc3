"""The tests that need a GPU, run by pytest in several processes: most of their time goes into compiling kernels."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["chosen_tests", "run_tests"]

MOST_PROCESSES = 12

OPTIONS = ("-q", "--tb=short", "--maxfail=3", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default")
"""Warnings are errors for our own tests on a CPU; what libraries say on a GPU is not the question here."""

SHOWN = 120
"""Lines of each process that failed."""


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    output: IO[str]


def run_tests(folder: Path, seconds: float, words: Sequence[str] = ()) -> dict[str, Any]:
    """Run them in `folder`, where the checkout looks installed, and stop after so many seconds.

    words : further ones for pytest

    Returns
    -------
    {"passed": whether all did, "summary": a line, "seconds": …, "output": what failed}
    """
    began = time.perf_counter()
    try:
        tests = chosen_tests(folder, words)
    except RuntimeError as error:
        return {
            "passed": False,
            "summary": "not collected",
            "seconds": time.perf_counter() - began,
            "output": str(error),
        }
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1, len(tests)))
    running = [_started(folder, tests[i::count]) for i in range(count)] if tests else []
    ends = [_ended(process, seconds - (time.perf_counter() - began)) for process in running]
    bad = [output for code, output in ends if code != 0]
    done = sum(int(number) for _, output in ends for number in re.findall(r"(\d+) passed", output))
    took = time.perf_counter() - began
    return {
        "passed": bool(tests) and not bad,
        "summary": f"{done} of {len(tests)} tests passed in {took:.0f} s, by {len(running)} processes",
        "seconds": took,
        "output": "\n".join(line for output in bad for line in output.splitlines()[-SHOWN:]),
    }


def chosen_tests(folder: Path, words: Sequence[str] = ()) -> list[str]:
    """Their names, in random order: neighbours cost about the same.

    Raises
    ------
    RuntimeError
        with what pytest said, if it cannot collect them.
    """
    files = sorted(str(f.relative_to(folder)) for f in (folder / "tests").rglob("test_*.py") if _needs_gpu(f))
    command = [sys.executable, "-m", "pytest", *OPTIONS, "--collect-only", *files, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):  # 5: none chosen
        raise RuntimeError(f"pytest cannot collect the tests:\n{done.stdout}{done.stderr}")
    names = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    random.Random(0).shuffle(names)
    return names


def _needs_gpu(file: Path) -> bool:
    return "mark.gpu" in file.read_text(encoding="utf-8")


def _started(folder: Path, tests: Sequence[str]) -> _Running:
    # cuBLAS is deterministic, as the tests ask, only with a workspace of this form.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 # a pipe that nobody reads would fill up
    command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return _Running(process, output)


def _ended(running: _Running, seconds: float) -> tuple[int, str]:
    """(exit status, output)."""
    try:
        code, more = running.process.wait(max(0.1, seconds)), ""
    except subprocess.TimeoutExpired:
        running.process.kill()
        code, more = running.process.wait(), "\nstopped: no time was left; give it more --minutes"
    with running.output:
        running.output.seek(0)
        return code, running.output.read() + more
