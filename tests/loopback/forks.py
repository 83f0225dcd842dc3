"""Command lines in processes of their own, without an import for each: one process imports everything and forks.

    with forks(hub, folder) as desk:
        done = desk.llmprune("push", "pruned", "acme/x")

The tests start many short commands to see each of them fail, and importing torch takes longer than all else that they
do. A fork is a process in every respect that matters here: it can be killed, it meets the Hub alone, and its
environment is its own. What the clients read from the environment when they are imported, `_run` puts right.

Run as a script, this file is that process: an order a line on standard input, {"argv", "cwd", "env", "out", "err"} to
start one, {"wait": pid} to end it; an answer a line on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tests.loopback.hub import LoopbackHub

__all__ = ["Ended", "Forks", "Started", "forks"]


@dataclass(frozen=True)
class Ended:
    """What a command said, and its exit status, negative for a signal."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Started:
    """A command that is running."""

    desk: Forks
    pid: int
    out: Path
    err: Path

    def kill(self) -> None:
        """SIGKILL: no `finally` runs."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Wait for it."""
        code = self.desk.order(wait=self.pid)["code"]
        return Ended(code, self.out.read_text(), self.err.read_text())


@dataclass
class Forks:
    """A working directory, and a way to start commands there with the Hub in reach. Use it through `forks`."""

    hub: LoopbackHub
    folder: Path
    process: subprocess.Popen[str]
    numbers: Iterator[int] = field(default_factory=count)

    def start(self, *arguments: str, **settings: str) -> Started:
        """Start `llmprune` with these arguments; `settings` go into its environment."""
        home = self.hub.home.parent / f"fork-{next(self.numbers)}"  # Xet remembers in HF_HOME what it has sent
        home.mkdir()
        out, err = home / "out", home / "err"
        env = {"HF_HOME": str(home), **settings}
        argv = ["llmprune", *arguments]
        pid = self.order(argv=argv, cwd=str(self.folder), env=env, out=str(out), err=str(err))["pid"]
        return Started(self, pid, out, err)

    def llmprune(self, *arguments: str, code: int = 0, **settings: str) -> Ended:
        """Run a command to its end, which must have this exit status."""
        done = self.start(*arguments, **settings).end()
        assert done.code == code, done.stdout + done.stderr
        return done

    def order(self, **order: Any) -> Any:
        """Send an order and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def forks(hub: LoopbackHub, folder: Path) -> Iterator[Forks]:
    """The process that forks, with the Hub's environment."""
    env = {**hub.env, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env) as process:
        yield Forks(hub, folder, process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    import llmprune.job  # all that a command needs

    assert llmprune.job.run
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": os.fork() or _run(order)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(order: dict[str, Any]) -> NoReturn:
    """In the fork: be a process that was started with this command line."""
    from huggingface_hub import constants

    from llmprune.cli import main

    for stream, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(order["env"])
    constants.HF_HUB_DISABLE_XET = os.environ.get("HF_HUB_DISABLE_XET") == "1"
    os.chdir(order["cwd"])
    sys.argv = order["argv"]
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
