"""How several processes end: an error is told once, a killed one stops the others, a signal stops all after the same
layer; and the same command goes on, with as many processes as before or another number.

Here the processes have no torchrun above them, which would help: see test_torchrun.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import llmprune
from llmprune.distributed import leave, team_from_environment, told_by_others
from llmprune.distributed.ending import Ending, Outcome
from llmprune.errors import LlmpruneError, UserError
from llmprune.job import stages
from tests.distributed.processes import PATIENCE, begin, codes, command_line
from tests.resumable import LAYERS, checkpoint, command, run_to_end, tensors, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")]

SECONDS = 20.0
"""How soon the others must have ended: on a busy machine, and far sooner than a run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and `whole`: what two processes make of it when nobody interferes."""
    folder = tmp_path_factory.mktemp("endings")
    checkpoint(folder)
    assert codes(start(folder, "whole", 2)) == [0, 0]
    return folder


def start(folder: Path, output: str, count: int, *more: str) -> list[ForkServerProcess]:
    """Start the command line in `count` processes."""
    arguments = command(folder, output, "--method", "sparsegpt", *more)
    return begin(count, command_line, arguments, log=folder / f"{output}.log")


def told(folder: Path, output: str) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob(f"{output}.log.?")))


def layers(folder: Path, output: str) -> int:
    return len(list((folder / f"{output}.partial").glob("layer-*.safetensors")))


def goes_on(folder: Path, output: str, count: int) -> None:
    """The same command goes on from the safe point, and gives a checkpoint that is what its report says."""
    assert codes(start(folder, output, count)) == [0] * count
    assert "Going on from a safe point" in told(folder, output)
    assert llmprune.verify(folder / output).ok
    assert not list(folder.glob(f"{output}.partial"))


def same_bits(folder: Path, output: str) -> None:
    expected, found = tensors(folder / "whole"), tensors(folder / output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_team_of_one_gives_the_bits_of_a_plain_run(folder: Path) -> None:
    assert codes(start(folder, "one", 1)) == [0]
    assert run_to_end(command(folder, "plain", "--method", "sparsegpt")) == 0
    one, plain = tensors(folder / "one"), tensors(folder / "plain")
    assert all(torch.equal(one[name], plain[name]) for name in plain)


def test_an_error_that_all_meet_is_told_once(folder: Path) -> None:
    assert codes(start(folder, "error", 2, "--tune", "2")) == [2, 2]
    assert told(folder, "error").count("Error:") == 1
    assert "several processes cannot tune or distill" in (folder / "error.log.0").read_text()
    assert "--tune 0" in told(folder, "error")


def _one_fails(folder: Path, rank: int) -> None:
    """One process finds its disk missing, while the others work or wait for it."""
    if int(os.environ["RANK"]) == rank:

        def missing(*_: object, **__: object) -> None:
            raise UserError("no such disk on this machine.")

        stages.survey_model = missing
    command_line(command(folder, f"one-{rank}"))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_and_is_told_once(folder: Path, rank: int) -> None:
    assert codes(begin(2, _one_fails, folder, rank, log=folder / f"one-{rank}.log")) == [2, 2]
    assert told(folder, f"one-{rank}").count("no such disk on this machine.") == 1
    assert "Error: no such disk" in (folder / f"one-{rank}.log.0").read_text()


@pytest.mark.parametrize(("victim", "then"), [(1, 2), (0, 3)])
def test_a_killed_process_stops_the_others_and_the_run_goes_on(folder: Path, victim: int, then: int) -> None:
    output = f"killed-{victim}"
    processes = start(folder, output, 2)
    wait_for(lambda: layers(folder, output) > 1, processes[victim])
    processes[victim].kill()
    began = time.monotonic()
    assert codes(processes) == ([2, -9] if victim else [-9, 2])
    assert time.monotonic() - began < SECONDS < PATIENCE
    assert told(folder, output).count("Another process of this run is gone") == 1
    assert "the same command goes on from" in told(folder, output).lower()
    assert not (folder / output).exists()
    goes_on(folder, output, then)
    if then == 2:
        same_bits(folder, output)


@pytest.mark.parametrize(("number", "code", "asked"), [(signal.SIGTERM, 143, (0, 1)), (signal.SIGINT, 130, (1,))])
def test_a_signal_stops_all_after_the_same_layer(
    folder: Path, number: signal.Signals, code: int, asked: tuple[int, ...]
) -> None:
    output = f"asked-{code}"
    processes = start(folder, output, 2)
    wait_for(lambda: layers(folder, output) > 0, processes[0])
    for rank in asked:
        pid = processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
    assert codes(processes) == [code, code]
    assert told(folder, output).count("Interrupted.") == 1
    assert 0 < layers(folder, output) < LAYERS
    assert f"safe in {folder / output}.partial: the same command goes on" in (folder / f"{output}.log.0").read_text()
    if len(asked) > 1:
        goes_on(folder, output, 2)
        same_bits(folder, output)


def _fault(rank: int) -> None:
    def fail_or_wait() -> None:
        with team_from_environment() as team:
            if team.rank == rank:
                raise ZeroDivisionError("a fault of ours")
            team.total(1)

    with pytest.raises(LlmpruneError) as ended:
        fail_or_wait()
    assert told_by_others(ended.value)
    leave(2, ended.value)


def test_a_fault_keeps_its_traceback_and_ends_the_others_without_a_word(tmp_path: Path) -> None:
    found = codes(begin(3, _fault, 1, log=tmp_path / "log"))
    assert found == [2, 1, 2]
    assert "ZeroDivisionError: a fault of ours" in (tmp_path / "log.1").read_text()
    assert "fault" not in (tmp_path / "log.0").read_text() + (tmp_path / "log.2").read_text()


def _another_model(folder: Path) -> None:
    """The second machine has another checkpoint under the same name."""
    if os.environ["RANK"] == "1":
        load_model = stages.load_model

        def other(*given: Any, **rest: Any) -> Any:
            loaded = load_model(*given, **rest)
            next(loaded.model.parameters()).data[0, 0] += 1
            return loaded

        stages.load_model = other
    command_line(command(folder, "other"))


def test_different_models_under_one_name_are_refused(folder: Path) -> None:
    assert codes(begin(2, _another_model, folder, log=folder / "other.log")) == [2, 2]
    assert told(folder, "other").count("the processes have different models") == 1


def test_who_hears_the_farewell_while_it_waits_leaves_the_telling_to_rank_0() -> None:
    """Rank 0 has told and gone, and with it the store that would say so."""
    ending = Ending.__new__(Ending)
    ending._farewell = 0

    class Lost(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            ending._farewell = 2
            return True

    class Gone:
        def compare_set(self, *_: str) -> bytes:
            raise RuntimeError("connection closed")

    ending.team, ending.store = cast("Any", SimpleNamespace(leads=False, rank=1, lost=Lost())), Gone()
    assert not ending._tells(Outcome(0, "error", "no such model.", 2))
