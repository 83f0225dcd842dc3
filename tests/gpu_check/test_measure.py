"""Tuning and timing: what is wrong is named and not timed, and none stops the others."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu_check.fakes import FakeDevice, case


def test_a_wrong_product_and_a_failing_one_are_named_and_not_timed(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = gpu.candidates.CANDIDATES

    def fails(x: torch.Tensor, form: object, word: str) -> torch.Tensor:
        raise ValueError("out of\n resources")

    def forgets(x: torch.Tensor, form: object, word: str) -> torch.Tensor:
        return torch.empty(len(x), 64, dtype=torch.bfloat16)

    changed = [replace(ways[1], product=fails), replace(ways[3], product=forgets)]
    monkeypatch.setattr(gpu.candidates, "CANDIDATES", [ways[0], *changed])
    row = gpu.measure.Bench(FakeDevice()).row(case(gpu, "2:4", 4))
    dense, failed, wrong = row.measured
    assert dense.rounds
    assert (failed.failure, failed.wrong, failed.rounds) == ("ValueError: out of resources", False, [])
    assert (wrong.wrong, wrong.rounds) == (True, [])
    assert row.best() is None
    text = gpu.table.failures([row], [])
    assert "wrong result" in text[0]
    assert "out of resources" in text[1]
    assert gpu.run.Result({}, "", 0, rows=[row]).wrong


def test_a_gpu_that_is_lost_ends_the_run_and_what_was_found_is_kept(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()

    def breaks(x: torch.Tensor, form: object, word: str) -> torch.Tensor:
        device.broken = True
        raise RuntimeError("an illegal memory access was encountered")

    ways = gpu.candidates.CANDIDATES
    monkeypatch.setattr(gpu.candidates, "CANDIDATES", [ways[0], replace(ways[5], product=breaks)])
    monkeypatch.setattr(
        gpu.run, "made_plan", lambda small: gpu.rows.Plan((), (case(gpu, "2:4", 4), case(gpu, "50%", 1)))
    )
    result = gpu.run.Result({}, "", 0)
    gpu.run.run(device, result, ["kernels"], minutes=1, small=True, words=())
    assert len(result.rows) == 1
    assert result.broken is not None
    assert "sell parts=" in result.broken
    assert result.wrong


def test_tuning_keeps_the_fastest_settings(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings take 1, 2, 3 … microseconds in reverse order of their list, and the second fails."""
    words = [f"bitmap_dot:parts={number}" for number in range(6)]
    now: list[str] = []
    way = gpu.candidates.CANDIDATES[6]

    def product(x: torch.Tensor, form: Any, word: str) -> torch.Tensor:
        now[:] = [word]
        if word == words[1]:
            raise ValueError("too large")
        return torch.Tensor(way.product(x, form, word))

    device = FakeDevice(lambda: (6 - words.index(now[0])) * 1e-6)
    changed = replace(way, product=product, settings=lambda case, capability: words)
    monkeypatch.setattr(gpu.candidates, "CANDIDATES", [changed])
    [found] = gpu.measure.Bench(device).tune(case(gpu, "50%", 1), 60)
    assert (found.config, found.microseconds) == (words[5], pytest.approx(1))
    assert (found.default, found.default_microseconds) == (words[0], pytest.approx(6))
    assert (found.tried, found.listed, list(found.failures)) == (6, 6, [words[1]])
    [hurried] = gpu.measure.Bench(device).tune(case(gpu, "50%", 1), 0)
    assert hurried.tried == 2
    assert words[0] in hurried.times


def test_candidates_take_turns(gpu: SimpleNamespace) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    assert gpu.clock.laps(runs, 3) == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abcbcacab"


@pytest.mark.parametrize(("copies", "seconds", "repeats"), [(2, 1e-5, 10), (8, 1e-5, 3), (50, 1e-5, 1), (2, 1, 1)])
def test_a_graph_has_about_20_calls_or_is_long(gpu: SimpleNamespace, copies: int, seconds: float, repeats: int) -> None:
    assert gpu.clock.repeats_for(copies, seconds) == repeats


def test_memory_that_nobody_wrote_shows(gpu: SimpleNamespace) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with gpu.clock.poisoned():
        assert torch.empty(3).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
    truth = torch.ones(4, dtype=torch.float64)
    assert gpu.clock.errors(torch.tensor([1, 1, 1, math.nan]), truth)[0] == math.inf
    assert gpu.clock.errors(torch.tensor([1, 1, 1, 1.5]), truth) == (0.5, 0.25)
