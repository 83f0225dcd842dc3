"""Several processes of one run without torchrun: forked from a server that has imported everything once, which takes a
tenth of a second a process, with the environment that torchrun would set."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

__all__ = ["PATIENCE", "begin", "codes", "command_line", "together"]

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line has it, for the server of processes

PATIENCE = 120.0
"""Seconds after which a test gives up on a process."""


def begin(count: int, work: Callable[..., None], *arguments: Any, log: Path) -> list[ForkServerProcess]:
    """Start `count` processes of one team; what process 1 prints goes to `log` with ending .1, and so on."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmprune.job", "llmprune.distributed.ending", "tests.distributed.processes"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_one, args=(environment, log, work, arguments))
        process.start()
        processes.append(process)
    return processes


def codes(processes: list[ForkServerProcess]) -> list[int]:
    """Their exit codes, when all have ended."""
    found = []
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode is not None, "it hangs"
        found.append(process.exitcode)
    return found


def together(count: int, work: Callable[..., None], *arguments: Any, log: Path) -> None:
    """Run `work(*arguments)` in `count` processes, all of which must succeed."""
    found = codes(begin(count, work, *arguments, log=log))
    assert found == [0] * count, [path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))]


def command_line(arguments: list[str]) -> None:
    """The command line, as a process of a team runs it."""
    from llmprune.cli import main

    sys.argv = ["llmprune", *arguments]
    main()


def _one(environment: dict[str, Any], log: Path, work: Callable[..., None], arguments: Any) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    out = os.open(f"{log}.{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        work(*arguments)
    except Exception:
        traceback.print_exc()
        os._exit(1)
