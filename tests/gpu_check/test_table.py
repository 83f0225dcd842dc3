"""What is told of a run: goals, the page, and what separate runs add up to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu_check.fakes import case, measured


def _row(gpu: SimpleNamespace, one: Any, dense: float, ours: float, torchs: float | None = None) -> Any:
    cells = [measured(gpu, "cuBLAS", "dense", dense), measured(gpu, "mma", "ours", ours)]
    more = [] if torchs is None else [measured(gpu, "torch cuSPARSELt", "torch", torchs)]
    slow = measured(gpu, "expand+dot", "ours", 9 * ours)
    return gpu.rows.Row(one, [*cells, slow, *more])


def test_a_goal_is_as_good_as_its_worst_case(gpu: SimpleNamespace) -> None:
    large = (14336, 4096)
    rows = [
        _row(gpu, case(gpu, "2:4", 1, large), 32, 20, 120),
        _row(gpu, case(gpu, "2:4", 16, large), 29, 20),
        _row(gpu, case(gpu, "2:4", 64, large), 26, 20),
        _row(gpu, case(gpu, "2:4", 1, (4096, 4096)), 14, 10, 40),
    ]
    model = gpu.model.ModelResult(gpu.model.SMALL, dense_peak=100, sparse_peak=60)
    model.modes = [
        gpu.model.Mode("graph", [100.0], [160.0]),
        gpu.model.Mode("compiled", [150.0], [195.0]),
        gpu.model.Mode("failed", failure="x"),
    ]
    found = {goal.text: goal for goal in gpu.table.goals(rows, model)}
    few = found["2:4, 1-16 tokens, large"]
    assert (few.found, few.met) == (pytest.approx(1.45), False)
    assert "14336x4096 2:4, 16 tokens; worst of 2" in str(few)
    assert str(few).startswith("not met ")
    assert found["2:4, 1-16 tokens, 4096x4096"].met
    assert found["2:4, 64 tokens, large"].met
    assert found["2:4 against torch's semi-structured, one token"].found == pytest.approx(4)
    assert found["50 %, one token, large"].met is None
    # The mode counts in which the dense model is fastest.
    assert (found["model, decoding"].found, found["model, decoding"].met) == (pytest.approx(1.3), False)
    assert found["model, memory"].met


def test_the_page_says_what_was_measured_and_what_was_not(gpu: SimpleNamespace) -> None:
    row = _row(gpu, case(gpu, "2:4", 1, (4096, 4096)), 16.0, 10.0, 160.0)
    row.measured.append(gpu.rows.Measured("gemv", "ours", "gemv:rows=1", failure="wrong result: 3", wrong=True))
    row.measured.append(gpu.rows.Measured("torch CUTLASS", "torch", failure="RuntimeError: sm_90"))
    result = gpu.run.Result({"device": "A card", "L2": ""}, "scripts/gpu_check --output out", 3, rows=[row])
    held = result.as_json()
    page = gpu.table.markdown(held, rows=result.rows, model=None, notes=held["failures"])
    assert "device A card" in page
    assert "`scripts/gpu_check --output out`, seed 3" in page
    line = next(line for line in page.splitlines() if line.startswith("|4096x4096"))
    assert line.split("|")[1:9] == [
        "4096x4096", "2:4", "1", "16.0", "2.10", "10.0 µs (1.60×)", "1.60×", "WRONG",
    ]  # fmt: skip
    assert "|failed|0.10×|" in line
    assert "- gemv gemv:rows=1 at 4096x4096 2:4: wrong result: 3" in page
    assert "not measured model, decoding" in page
    empty = gpu.run.Result({}, "", 0)
    assert "|" not in gpu.table.markdown(empty.as_json(), rows=[], model=None, notes=[])


def test_parts_run_one_by_one_add_up_on_the_same_device_only(gpu: SimpleNamespace, tmp_path: Path) -> None:
    one = case(gpu, "2:4", 1)
    result = gpu.run.Result({"device": "A"}, "", 0, rows=[_row(gpu, one, 16.0, 10.0)])
    result.tuned = [gpu.rows.Tuned(one, "mma", "word", 1.0, "word", 1.0, times={"word": 1.0})]
    result.model = gpu.model.ModelResult(gpu.model.SMALL, modes=[gpu.model.Mode("graph", [1.0], [2.0])])
    gpu.run.write(tmp_path, result)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["measured"][1]["ratio"] == 1.6
    again = gpu.run.read(tmp_path, gpu.run.Result({"device": "A"}, "", 0))
    assert again.as_json() == result.as_json()
    assert gpu.run.read(tmp_path, gpu.run.Result({"device": "B"}, "", 0)).rows == []
    assert gpu.run.read(tmp_path, gpu.run.Result({"device": "A"}, "", 1)).rows == []
    assert gpu.run.read(None, gpu.run.Result({"device": "A"}, "", 0)).rows == []
