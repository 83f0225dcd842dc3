"""A run that was cut off goes on: killed, interrupted, out of disk; and what it gives is what one run would have given.

Processes are really killed. Where a moment matters it is picked by what lies on the disk, never by the clock.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
from llmprune.job import Observer
from tests.builders import tiny_model, tiny_tokenizer
from tests.resumable import LAYERS, begin, checkpoint, command, run_to_end, tensors, wait_for

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and `whole`: what comes of it when nobody interferes."""
    folder = tmp_path_factory.mktemp("resume")
    checkpoint(folder)
    assert run_to_end(command(folder, "whole")) == 0, log(folder, "whole")
    assert not (folder / "whole.partial").exists()
    return folder


def log(folder: Path, output: str) -> str:
    path = folder / f"{output}.log"
    return path.read_text() if path.exists() else ""


def finished(folder: Path, output: str) -> int:
    """How many layers the safe point holds."""
    manifest = folder / f"{output}.partial" / "manifest.json"
    return len(json.loads(manifest.read_text())["layers"]) if manifest.exists() else 0


def assert_whole(folder: Path, output: str) -> None:
    """The output is that of the run that nobody interfered with, bit for bit, verified, and nothing else is left."""
    expected, found = tensors(folder / "whole"), tensors(folder / output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert llmprune.verify(folder / output).ok
    rows = [json.loads((folder / one / "llmprune_report.json").read_text())["pruned"] for one in ("whole", output)]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert not list(folder.glob(f"{output}.partial")) + list(folder.glob(f".{output}.*"))


@pytest.mark.parametrize("mode", ["--no-low-memory", "--low-memory"])
def test_a_killed_run_goes_on_and_gives_the_same_bits(folder: Path, mode: str) -> None:
    """Killed three times at random, once it has got further than the time before; then it may finish."""
    moments, output, reached = random.Random(mode), f"killed{mode}", 0
    for _ in range(3):
        process = begin(command(folder, output, mode))
        wait_for(lambda: finished(folder, output) > reached, process)  # noqa: B023 - called at once
        process.join(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        reached = finished(folder, output)
        assert not (folder / output).exists() or process.exitcode == 0
    if not (folder / output).exists():
        assert run_to_end(command(folder, output, mode)) == 0, log(folder, output)
        assert "Going on from a safe point" in log(folder, output)
    assert_whole(folder, output)


def test_a_run_goes_on_in_the_other_mode(folder: Path) -> None:
    """What is safe of a run in memory is good for one that leaves its weights on disk, and the other way round."""
    process = begin(command(folder, "other", "--no-low-memory"))
    wait_for(lambda: finished(folder, "other") >= 2, process)
    process.kill()
    process.join()
    assert run_to_end(command(folder, "other", "--low-memory")) == 0, log(folder, "other")
    assert_whole(folder, "other")


class CutOff(Observer):
    """Ends a run when its first layer is done."""

    def layer_done(self, index: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"effort": "best", "num_samples": 8}),  # permutations, dense targets, distillation with its masks
        ("gpt2", {"effort": "balanced", "tune": 1, "low_memory": True}),
        ("mixtral", {}),
        ("gpt_oss", {"method": "sparsegpt", "low_memory": True}),
    ],
)
def test_every_step_goes_on_as_if_nothing_had_happened(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"dataset": ids, "safe_points": 0, **settings}
    llmprune.prune(str(tmp_path / "model"), output_dir=tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(str(tmp_path / "model"), output_dir=tmp_path / "cut", observer=CutOff(), **common)
    assert finished(tmp_path, "cut") == 1
    result = llmprune.prune(str(tmp_path / "model"), output_dir=tmp_path / "cut", **common)
    assert any("went on from a safe point" in note for note in result.report.notes)
    assert_whole(tmp_path, "cut")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_layer_finish_and_says_where_the_safe_point_is(
    folder: Path, number: signal.Signals, code: int
) -> None:
    output = f"asked-{code}"
    process = begin(command(folder, output))
    wait_for(lambda: finished(folder, output) > 0, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code, log(folder, output)
    assert "Stopping after this layer" in log(folder, output)
    assert f"safe in {folder / output}.partial: the same command goes on" in log(folder, output)
    assert finished(folder, output) < LAYERS
    assert not (folder / output).exists()
    assert run_to_end(command(folder, output)) == 0, log(folder, output)
    assert_whole(folder, output)


def test_a_second_signal_stops_at_once_and_keeps_the_finished_layers(folder: Path) -> None:
    process = begin(command(folder, "twice", "--num-samples", "400"))
    wait_for(lambda: finished(folder, "twice") > 0, process)
    before = finished(folder, "twice")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "Stopping after this layer" in log(folder, "twice"), process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert before <= finished(folder, "twice") <= before + 1
    assert f"safe in {folder / 'twice'}.partial" in log(folder, "twice")


def test_another_run_is_refused_with_what_differs_and_never_starts_anew(folder: Path) -> None:
    process = begin(command(folder, "differs"))
    wait_for(lambda: finished(folder, "differs") > 0, process)
    process.kill()
    process.join()
    assert run_to_end(command(folder, "differs", "--sparsity", "4:8")) == 2
    assert "config.sparsity was '2:4' and is '4:8'" in log(folder, "differs")
    assert "--resume never" in log(folder, "differs")
    assert finished(folder, "differs") > 0  # it is still there
    assert run_to_end(command(folder, "differs", "--resume", "never")) == 0
    assert "Going on" not in log(folder, "differs")
    assert_whole(folder, "differs")


def test_a_finished_run_is_not_begun_again(folder: Path) -> None:
    assert run_to_end(command(folder, "whole")) == 2
    assert "whole exists already" in log(folder, "whole")


@pytest.mark.parametrize(("mode", "share"), [("--no-low-memory", 2), ("--low-memory", 2), ("--low-memory", 16)])
def test_a_full_disk_leaves_whole_layers_only(folder: Path, mode: str, share: int) -> None:
    """Half of the output's size lets all layers through, but not the output; a sixteenth is too little for a layer."""
    output, whole = f"full{mode}-{share}", (folder / "whole" / "model.safetensors").stat().st_size
    assert run_to_end(command(folder, output, mode), limit=whole // share) == 2
    assert "could not be written" in log(folder, output)
    assert ("layers are safe in" in log(folder, output)) == (share == 2)
    assert finished(folder, output) == (LAYERS if share == 2 else 0)
    assert not (folder / output).exists()
    assert not list(folder.glob(f".{output}.*"))
    assert not list((folder / f"{output}.partial").glob("*.tmp"))
    assert run_to_end(command(folder, output, mode)) == 0, log(folder, output)
    assert_whole(folder, output)
