"""Safe points on disk: what counts, what does not, and whose they are."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.checkpoint.partial import Partial
from llmprune.errors import UserError
from llmprune.results import PrunedWeight, TunedPart

RUN: dict[str, Any] = {"model": "abc", "config": {"sparsity": "2:4", "seed": 0, "ignore": ()}}


def row(layer: int) -> PrunedWeight:
    return PrunedWeight(
        name=f"layers.{layer}.up",
        parameter=f"layers.{layer}.up",
        expert=None,
        input_axis=1,
        layer=layer,
        shape=(2, 4),
        pattern="2:4",
        zeros=4,
        scope="group",
        error=0.1,
        tokens=7,
        seconds=0.25,
        notes=("note",),
    )


EARLIER: list[Partial] = []


def opened(folder: Path, run: dict[str, Any] = RUN, *, resume: bool = True) -> Partial:
    """As a process does when all that came before it are gone, and their locks with them."""
    while EARLIER:
        EARLIER.pop()._lock.release()
    partial = Partial(folder / "out")
    EARLIER.append(partial)
    partial.open(run, resume=resume)
    return partial


def write(partial: Partial, *layers: int) -> None:
    for layer in layers:
        weights = {f"layers.{layer}.up": torch.full((2, 4), float(layer), dtype=torch.bfloat16)}
        part = TunedPart("layers.0.mlp", 0.5, 0.25, 1)
        partial.write(layer, weights, weights=[row(layer)], tuned=[part], adjusted={"b", "a"})


def test_what_was_committed_comes_back(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0, 1)
    partial.commit()
    again = opened(tmp_path)
    assert again.layers == partial.layers
    assert again.layers[1].weights == [row(1)]
    ((name, tensor),) = again.tensors(1)
    assert (name, tensor.dtype, tensor.unique().item()) == ("layers.1.up", torch.bfloat16, 1.0)


def test_what_was_written_and_not_committed_does_not_count(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0)
    partial.commit()
    write(partial, 1)
    assert list(opened(tmp_path).layers) == [0]
    assert partial.told.startswith("1 layer is safe in")


def test_layers_count_up_to_the_first_whose_file_is_not_whole(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0, 1, 2)
    partial.commit()
    with partial.path(1).open("rb+") as file:
        file.truncate(partial.layers[1].nbytes - 1)
    assert list(opened(tmp_path).layers) == [0]


def test_another_run_is_refused_with_each_thing_that_differs(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0)
    partial.commit()
    other = {"model": "d" * 64, "config": {**RUN["config"], "seed": 1}}
    with pytest.raises(UserError, match=r"1 finished layer.*config\.seed was 0 and is 1; model was 'abc'"):
        opened(tmp_path, other)
    assert list(opened(tmp_path).layers) == [0]


def test_never_removes_what_an_earlier_run_left(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0)
    partial.commit()
    assert not opened(tmp_path, {"model": "other"}, resume=False).layers
    assert [path.name for path in partial.directory.iterdir()] == ["lock"]


def test_two_runs_at_one_output_are_one_too_many(tmp_path: Path) -> None:
    first, second = opened(tmp_path), Partial(tmp_path / "out")
    with pytest.raises(UserError, match="another run is at work on this output"):
        second.open(RUN, resume=False)
    (first.directory / "layer-00001.tmp").write_bytes(b"half")
    second.tidy()
    assert (first.directory / "layer-00001.tmp").exists()
    first.tidy()
    assert not first.directory.exists()
    second.open(RUN, resume=True)
    second.tidy()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "what"), [("{", "is damaged"), ('{"schema": 99}', "another release")])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, content: str, what: str) -> None:
    partial = opened(tmp_path)
    write(partial, 0)
    (partial.directory / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=what):
        opened(tmp_path)


def test_tidying_keeps_safe_points_and_removes_the_rest(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0)
    partial.commit()
    partial.converted.mkdir()
    (partial.directory / "layer-00001.tmp").write_bytes(b"half")
    partial.tidy()
    assert {path.name for path in partial.directory.iterdir()} == {"layer-00000.safetensors", "manifest.json"}
    partial.remove()
    assert not partial.directory.exists()


def test_converted_weights_of_a_dead_process_are_removed(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    dead = partial.directory / f"converted-{platform.node()}-999999999"
    dead.mkdir(parents=True)
    opened(tmp_path)
    assert not dead.exists()


def test_converted_weights_of_another_machine_are_left_alone(tmp_path: Path) -> None:
    others = [f"converted-{platform.node()}-2-{2**22 + 1}", "converted-elsewhere-x"]
    for name in others:
        (tmp_path / "out.partial" / name).mkdir(parents=True)
    opened(tmp_path)
    assert all((tmp_path / "out.partial" / name).is_dir() for name in others)


@pytest.mark.parametrize("resume", [True, False])
def test_a_directory_with_something_else_in_it_is_not_ours(tmp_path: Path, resume: bool) -> None:
    """For in the end it is removed."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.bin").write_text("mine")
    with pytest.raises(UserError, match=r"holds precious\.bin, which is none: move it away, or choose another"):
        opened(tmp_path, resume=resume)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["precious.bin"]


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    write(partial, 0)
    partial.commit()
    manifest = json.loads((partial.directory / "manifest.json").read_text())
    assert manifest["layers"][0]["file"] == "layer-00000.safetensors"
    assert manifest["fingerprint"]["config"]["ignore"] == []
