"""The plan of a run: what is measured, in which order, and with which settings."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace

import pytest

from tests.gpu_check.fakes import case, measured


def test_the_plan_has_all_that_goals_are_about_and_each_weight_once(gpu: SimpleNamespace) -> None:
    plan = gpu.rows.made_plan()
    assert len(plan.measure) == 5 * 4 * 8
    assert {c.tokens for c in plan.measure} == {1, 4, 8, 16, 64, 256, 2048, 16384}
    for cases in (plan.measure, plan.tune):
        weights = [key for key, _ in groupby(cases, key=lambda c: (c.rows, c.columns, c.pattern))]
        assert len(weights) == len(set(weights))
    with_goals = set(gpu.rows.GOAL_SHAPES)
    shapes = [(c.rows, c.columns) in with_goals for c in plan.measure]
    assert shapes == sorted(shapes, reverse=True)
    rows = [gpu.rows.Row(c, [measured(gpu, "cuBLAS", "dense", 2), measured(gpu, "mma")]) for c in plan.measure]
    found = gpu.table.goals(rows, None)
    assert [g.text for g in found if g.met is None] == [
        "2:4 against torch's semi-structured, one token",
        "model, decoding",
        "model, memory",
    ]


def test_every_case_of_the_plan_fits_into_an_h100(gpu: SimpleNamespace) -> None:
    plan = gpu.rows.made_plan()
    needed = {c: gpu.rows.memory_needed(c, 50 * 2**20) for c in plan.measure}
    assert max(needed.values()) < 40e9
    largest = max(needed, key=needed.__getitem__)
    assert (largest.rows, largest.columns, largest.tokens) == (28672, 4096, 16384)
    assert 16e9 + 10e9 < gpu.model.LLAMA_8B.memory_needed < 60e9


@pytest.mark.parametrize("nbytes", [10, 1 << 20, 50 << 20, 400 << 20])
def test_copies_exceed_the_cache_three_times(gpu: SimpleNamespace, nbytes: int) -> None:
    copies = gpu.rows.copies_for(nbytes, 50 << 20)
    assert copies >= 2
    assert copies == 50 or copies * nbytes >= 150 << 20


def test_settings_come_from_the_most_similar_case(gpu: SimpleNamespace) -> None:
    Tuned = gpu.rows.Tuned
    known = [
        Tuned(case(gpu, "2:4", 1), "mma", "one"),
        Tuned(case(gpu, "2:4", 16), "mma", "sixteen"),
        Tuned(case(gpu, "2:4", 8, (64, 64)), "mma", "another shape"),
        Tuned(case(gpu, "2:4", 8), "gemv", "another kernel"),
        Tuned(case(gpu, "50%", 1), "sell", "half"),
        Tuned(case(gpu, "70%", 1), "sell", "seventy"),
    ]
    assert gpu.rows.nearest(case(gpu, "2:4", 8), known, "mma") == ["sixteen", "one"]
    assert gpu.rows.nearest(case(gpu, "70%", 1), known, "sell")[0] == "seventy"
    assert gpu.rows.nearest(case(gpu, "60%", 1), known, "mma") == []


def test_time_is_shared_among_the_parts_that_run(gpu: SimpleNamespace) -> None:
    every = gpu.run.Deadline(10, gpu.run.PARTS, clock=lambda: 0)
    assert [every.left(part) for part in gpu.run.PARTS] == pytest.approx([210, 360, 510, 600])
    assert gpu.run.Deadline(10, ["model"], clock=lambda: 0).left("model") == pytest.approx(600)
    two = gpu.run.Deadline(10, ["tune", "kernels"], clock=lambda: 0)
    assert [two.left("tune"), two.left("kernels")] == pytest.approx([300, 600])
