"""Under torchrun itself: what a person starts, and what he sees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.resumable import LAYERS, checkpoint, command

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="torchrun has no libuv on Windows")]

PATIENCE = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    checkpoint(folder)
    return folder


def torchrun(count: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "llmprune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", *launcher, *arguments], stderr=file, env=environment)


def test_a_killed_process_is_told_once_and_the_run_ends(folder: Path) -> None:
    process = torchrun(2, command(folder, "killed"), folder / "killed.log")
    until = time.monotonic() + PATIENCE
    while not list((folder / "killed.partial").glob("layer-*")):
        assert time.monotonic() < until
        assert process.poll() is None, (folder / "killed.log").read_text()
        time.sleep(0.01)
    (victim,) = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(PATIENCE) != 0
    assert time.monotonic() - began < 25, "torchrun itself gives up after 30 seconds"
    told = (folder / "killed.log").read_text()
    assert told.count("Another process of this run is gone") == 1
    assert f"safe in {folder / 'killed'}.partial: the same command goes on from there." in told
    assert "Interrupted" not in told
    assert len(list((folder / "killed.partial").glob("layer-*"))) < LAYERS
