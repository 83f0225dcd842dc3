"""Choosing a path: by what was measured on this machine, else by a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmprune.errors import UserError
from llmprune.runtime import timing, tune
from llmprune.runtime.dispatch import choose, rounded
from llmprune.runtime.paths import paths
from llmprune.runtime.tune import tune_weights
from llmprune.runtime.weight import SparseWeight
from llmprune.sparsity.pack import pack
from tests.test_runtime_sparse_linear import sparse_weight

CPU = torch.device("cpu")
NAMES = ("kernel", "expand", "dense")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of timings for this test alone."""
    path = tmp_path / "timings.json"
    monkeypatch.setattr(timing, "timings_file", lambda device: path)
    timing.forget()
    monkeypatch.setattr(timing, "forget", timing.forget)
    return path


@pytest.fixture
def weight() -> SparseWeight:
    packed = pack(sparse_weight(16, 64, pattern="2:4"), "2:4")
    return SparseWeight(packed, None)


def store(weight: SparseWeight, times: dict[str, dict[str, float]], *, may_hold: bool = False) -> None:
    timing.store(CPU, timing.Timings({timing.described(weight): times}, may_hold))


def test_tokens_are_rounded_to_powers_of_two() -> None:
    assert [rounded(tokens) for tokens in (1, 2, 3, 8, 9, 4000, 10**6)] == [1, 2, 4, 8, 16, 4096, 4096]


def test_without_measurements_few_tokens_take_the_kernel_and_many_the_expansion(weight: SparseWeight) -> None:
    assert [choose(weight, tokens, NAMES) for tokens in (1, 8, 9, 500)] == ["kernel", "kernel", "expand", "expand"]
    assert choose(weight, 500, (*NAMES, "expand32")) == "expand32"


def test_the_fastest_that_was_measured_is_taken(weight: SparseWeight) -> None:
    store(weight, {"1": {"kernel": 9.0, "expand": 5.0, "dense": 1.0}, "64": {"kernel": 2.0, "expand": 3.0}})
    assert choose(weight, 1, NAMES) == "expand"
    assert choose(weight, 64, NAMES) == "kernel"
    assert choose(weight, 3000, NAMES) == "kernel"  # the nearest that was measured
    assert choose(weight, 1, ("expand", "dense")) == "expand"


def test_dense_is_held_only_where_that_was_allowed(weight: SparseWeight) -> None:
    times = {"1": {"kernel": 9.0, "expand": 50.0, "dense": 1.0}}
    store(weight, times)
    assert choose(weight, 1, NAMES) == "kernel"
    store(weight, times, may_hold=True)
    assert choose(weight, 1, NAMES) == "dense"


def test_what_was_known_of_other_weights_stays(weight: SparseWeight) -> None:
    packed = pack(sparse_weight(8, 64, pattern="2:4"), "2:4")
    other = SparseWeight(packed, None)
    store(weight, {"1": {"expand": 1.0}})
    store(other, {"1": {"kernel": 1.0}})
    assert timing.measured(weight, 1) == {"expand": 1.0}
    assert timing.measured(other, 1) == {"kernel": 1.0}


KIND = "2:4 float32 16x64 50%"

UNREADABLE = (
    "",
    "[1]",
    '{"microseconds": [], "may_hold": 1}',
    '{"microseconds": {"a": 1}}',
    f'{{"microseconds": {{"{KIND}": {{"few": {{"kernel": 1}}}}}}, "may_hold": 1}}',
    f'{{"microseconds": {{"{KIND}": {{"1": {{"kernel": null}}}}}}, "may_hold": 1}}',
)


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_cannot_be_read_counts_as_none(content: str, file: Path, weight: SparseWeight) -> None:
    file.write_text(content)
    timing.forget()
    assert timing.measured(weight, 1) == {}


def test_where_nothing_can_be_kept_the_error_says_where(
    file: Path, weight: SparseWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.touch()
    monkeypatch.setattr(timing, "timings_file", lambda device: file / "timings.json")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        store(weight, {"1": {"expand": 1.0}})


class TritonError(Exception):
    """As triton's own, which is not there for every system."""


REFUSALS = [RuntimeError("too much\nmemory"), torch.OutOfMemoryError("too much"), TritonError("too much")]


@pytest.mark.parametrize("error", REFUSALS, ids=type)
def test_a_path_that_cannot_run_here_is_left_out_and_told(
    error: Exception, weight: SparseWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise error

    real = paths
    monkeypatch.setattr(tune, "paths", lambda weight, tokens: real(weight, tokens) | {"other": lambda: fails})
    (found,) = tune.tune_weights([weight], seconds=0.0)
    assert all("other" not in times and "expand" in times for times in found.microseconds.values())
    assert found.unable == {"other": "with 1 tokens: too much"}
    assert tune._lines(found)[-1] == "  other cannot run here with 1 tokens: too much"


def test_where_even_expanding_fails_the_error_is_told(weight: SparseWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(tune, "paths", lambda *_: {"expand": lambda: fails})
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(tune.tune_weights([weight], seconds=0.0))


def test_tuning_times_every_path_and_is_taken_into_use(file: Path, weight: SparseWeight) -> None:
    (found,) = tune_weights([weight, weight], seconds=0.0)
    assert found.count == 2
    for tokens, times in found.microseconds.items():
        assert set(times) == set(paths(weight, int(tokens)))
        assert min(times.values()) > 0
    kept = json.loads(file.read_text())
    assert kept["microseconds"] == {KIND: found.microseconds}
    assert kept["about"]["torch"] == torch.__version__
    fastest = min(("kernel", "expand"), key=found.microseconds["1"].__getitem__)
    assert choose(weight, 1, NAMES) == found.chosen["1"] == fastest
