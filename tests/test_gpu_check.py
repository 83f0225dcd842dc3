"""scripts/gpu_check without a GPU: all but the clock. Kernels are their plain-torch twins, and time is made up."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

NAMES = ("kernel_benchmarks", "gpu_rows", "gpu_clock", "gpu_candidates", "gpu_measure", "gpu_model", "gpu_table")


@pytest.fixture
def gpu(repository: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules behind scripts/gpu_check, by what follows `gpu_` in their names."""
    monkeypatch.syspath_prepend(repository / "scripts")
    names = (*NAMES, "gpu_compile", "gpu_tests", "gpu_run")
    return SimpleNamespace(**{name.removeprefix("gpu_"): importlib.import_module(name) for name in names})


def case(gpu: SimpleNamespace, pattern: str = "2:4", tokens: int = 1, shape: tuple[int, int] = (64, 128)) -> Any:
    return gpu.kernel_benchmarks.Case(*shape, pattern, tokens)


class FakeDevice:
    """A CPU whose time is what a function of the first call says."""

    device, cache, capability = torch.device("cpu"), 1, (9, 0)

    def __init__(self, seconds: Callable[[], float] = lambda: 1e-5) -> None:
        self.seconds, self.broken = seconds, False

    def record(self, calls: Sequence[Callable[[], object]], times: int = 1) -> Callable[[], float]:
        calls[0]()
        each = self.seconds()
        return lambda: each * len(calls)

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    def free(self) -> int:
        return 2**40

    def peak(self, *, again: bool = False) -> int | None:
        return None


# The plan -------------------------------------------------------------------------------------------------------------


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
    measured = [gpu.rows.Row(c, [_measured(gpu, "cuBLAS", "dense", 2), _measured(gpu, "mma")]) for c in plan.measure]
    found = gpu.table.goals(measured, None)
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


# Candidates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "50%", "70%"])
def test_every_candidate_computes_the_product(gpu: SimpleNamespace, pattern: str) -> None:
    one = case(gpu, pattern, 4, (64, 1024))
    bench = gpu.measure.Bench(FakeDevice(), rounds=2)
    row = bench.row(one)
    names = {m.way for m in row.measured}
    ours = {"2:4": {"mma", "gemv", "expand+dot"}, "any": {"sell", "bitmap"}}[gpu.rows.kind(pattern)]
    assert names - {"torch CUTLASS", "torch cuSPARSELt"} == {"cuBLAS", "scratch+cuBLAS", *ours}
    for m in row.measured:
        if m.role != gpu.rows.TORCH:  # torch's own need a GPU
            assert m.failure is None, m
            assert len(m.rounds) == 2
            assert m.median == pytest.approx(10)
            assert m.error < 4e-3


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 0.5), ("60%", 0.4)])
def test_random_weights_have_their_pattern(gpu: SimpleNamespace, pattern: str, kept: float) -> None:
    weight = gpu.candidates.Weight(case(gpu, pattern, shape=(128, 256)), torch.device("cpu"))
    assert float((weight.dense != 0).double().mean()) == pytest.approx(kept, abs=0.02)
    if pattern == "2:4":
        assert int((weight.dense.view(128, 64, 4) != 0).sum(-1).max()) == 2


def test_copies_of_a_form_are_other_memory_and_the_same_weight(gpu: SimpleNamespace) -> None:
    one = case(gpu, "50%", 2)
    weight = gpu.candidates.Weight(one, torch.device("cpu"))
    x = torch.randn(2, 128).bfloat16()
    for way, words in gpu.candidates.candidates_for(one, (9, 0)).values():
        forms = weight.forms(way, words[0], gpu.candidates.form_bytes(way.form(weight, words[0])))
        assert len(forms) == 3
        first, last = (f if isinstance(f, torch.Tensor) else next(iter(vars(f).values())) for f in forms[::2])
        assert first.data_ptr() != last.data_ptr()
        assert torch.equal(way.product(x, forms[0], words[0]), way.product(x, forms[2], words[0]))


def test_what_is_compiled_ahead_can_be_launched_on_few_rows(gpu: SimpleNamespace) -> None:
    jobs = gpu.compile.jobs(gpu.rows.made_plan().tune, (9, 0))
    assert len(jobs) == len(set(jobs)) > 100
    from llmprune.triton_kernels.configs_24 import Shape24, parse_24

    for columns, pattern, tokens, _, word in jobs:
        if pattern == "2:4":
            shape = Shape24(tokens, gpu.compile.ROWS, columns, torch.bfloat16, (9, 0))
            assert parse_24(word).refusal(shape) is None if word else True


# Measuring ------------------------------------------------------------------------------------------------------------


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


# What is told ---------------------------------------------------------------------------------------------------------


def _measured(gpu: SimpleNamespace, way: str, role: str = "ours", microseconds: float = 1.0) -> Any:
    return gpu.rows.Measured(way, role, rounds=[microseconds] * 3)


def _row(gpu: SimpleNamespace, one: Any, dense: float, ours: float, torchs: float | None = None) -> Any:
    cells = [_measured(gpu, "cuBLAS", "dense", dense), _measured(gpu, "mma", "ours", ours)]
    more = [] if torchs is None else [_measured(gpu, "torch cuSPARSELt", "torch", torchs)]
    slow = _measured(gpu, "expand+dot", "ours", 9 * ours)
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


# The model ------------------------------------------------------------------------------------------------------------


def test_a_tiny_model_decodes_dense_and_packed(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.model, "NEW_TOKENS", 4)
    monkeypatch.setattr(gpu.model, "ROUNDS", 1)
    sizes = gpu.model.Sizes(2, 64, 128, 4, 2, 64)
    result = gpu.model.run_model(sizes, gpu.clock.Cpu(), seed=0, tuned=[], compile_too=lambda: False)
    assert result.packed_linears == 14
    [mode] = result.modes
    assert (mode.name, mode.failure, mode.same_tokens) == ("graph", None, 4)
    assert mode.ratio is not None
    assert 0.5625 < result.memory_ratio < 1
    dense = gpu.model.random_model(sizes, torch.device("cpu"), 0)
    decoder = gpu.model.Decoder(dense, compiled=False)
    for _ in range(3):
        decoder.step()
    # The same by transformers' own cache, which here begins with as many tokens whose keys and values are zero.
    assert int(decoder.position) == gpu.model.CONTEXT + 3
    assert float(decoder._cache.keys[1][0, 0, gpu.model.CONTEXT :, 0].abs().min(0).values) == 0  # the last is free
    assert (decoder._cache.keys[1][0, :, gpu.model.CONTEXT : gpu.model.CONTEXT + 3].abs().sum(-1) > 0).all()


def test_what_was_tuned_at_one_token_decides_the_models_path(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune.runtime import dispatch, timing
    from llmprune.runtime.weight import SparseWeight

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timing.forget()
    packed = gpu.candidates.Weight(case(gpu), torch.device("cpu")).packed
    weight = SparseWeight(packed.values, packed.index, None, "2:4", 128)
    tuned = [gpu.rows.Tuned(case(gpu), "mma", times={"mma:a": 3.0, "mma:b": 2.0})]
    tuned += [gpu.rows.Tuned(case(gpu, tokens=8), "mma", times={"mma:c": 1.0})]
    gpu.model.use_tuned(tuned, {(64, 128): weight})
    monkeypatch.setattr(dispatch, "has_kernel", lambda weight: True)
    assert dispatch.choose(weight, 1, ("kernel", "mma:a", "mma:b", "mma:c", "expand", "dense")) == "mma:b"
    timing.forget()


# The command ----------------------------------------------------------------------------------------------------------


def _launcher(repository: Path) -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(repository / "scripts" / "gpu_check"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_checkout_that_is_not_installed_can_be_imported_and_tested(
    gpu: SimpleNamespace, repository: Path, tmp_path: Path
) -> None:
    _launcher(repository).link_checkout(repository, tmp_path)
    code = "import llmprune.eval, llmprune.triton_kernels as t; print(llmprune.__file__, t.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        str(tmp_path / "llmprune" / "__init__.py"),
        str(tmp_path / "llmprune" / "triton_kernels" / "__init__.py"),
    ]
    assert [path.name for path in (tmp_path / "tests").iterdir() if path.name == "test_gpu_check.py"]
    [name] = gpu.tests.chosen_tests(tmp_path, ["-k", "single_weights"])
    assert name.endswith("test_matmul_24_gpu.py::test_single_weights_land_in_their_places")


def test_failing_tests_are_told(gpu: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    marked = "import pytest\n@pytest.mark.gpu\ndef test_{}():\n    assert {}\n"
    (folder / "test_one.py").write_text(marked.format("right", "True"))
    (folder / "test_two.py").write_text(marked.format("wrong", "3 == 4"))
    (folder / "test_cpu.py").write_text("def test_other():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    found = gpu.tests.run_tests(tmp_path, 60)
    assert not found["passed"]
    assert found["summary"].startswith("1 of 2 tests passed")
    assert "assert 3 == 4" in found["output"]
    assert "stopped: no time was left" in gpu.tests.run_tests(tmp_path, 0)["output"]
    assert not gpu.tests.run_tests(tmp_path, 60, ["-k", "no_such_test"])["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(repository: Path) -> None:
    command = [sys.executable, repository / "scripts" / "gpu_check", "--only", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "gpu_check needs a CUDA device, and torch sees none."
