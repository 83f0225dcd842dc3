"""The registry of products on a GPU: every operation is in it, and every candidate computes the product."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gpu_check.fakes import FakeDevice, case


def operations(repository: Path) -> set[str]:
    """What triton_kernels registers with torch: each launches a kernel, and is public under the same name."""
    files = (repository / "triton_kernels").glob("*.py")
    return {name for file in files for name in re.findall(r'custom_op\("llmprune::(\w+)"', file.read_text("utf-8"))}


def test_every_operation_has_a_row_in_the_registry(gpu: SimpleNamespace, repository: Path) -> None:
    found = operations(repository)
    assert len(found) >= 6
    called = {name for way in gpu.candidates.CANDIDATES for name in way.product.__code__.co_names}
    solved = re.search(r"^KERNELS = (\{.*?\})", (repository / "scripts/bench_solve").read_text("utf-8"), re.MULTILINE)
    assert solved is not None
    assert not found - called - set(json.loads(solved[1])), "no row in gpu_candidates.py, no way in bench_solve"


def test_every_operation_stands_beside_its_twin(repository: Path) -> None:
    for name in operations(repository):
        module = importlib.import_module(f"llmprune.triton_kernels.{name}")
        assert {name, f"{name}_torch"} <= set(module.__all__)


def test_a_column_of_the_table_for_every_candidate(gpu: SimpleNamespace) -> None:
    assert {way.name for way in gpu.candidates.CANDIDATES} == {"cuBLAS", *gpu.table.WAYS}


@pytest.mark.parametrize("pattern", ["2:4", "50%", "70%"])
def test_every_candidate_computes_the_product(gpu: SimpleNamespace, pattern: str) -> None:
    one = case(gpu, pattern, 4, (64, 1024))
    bench = gpu.measure.Bench(FakeDevice(), rounds=2)
    row = bench.row(one)
    names = {m.way for m in row.measured}
    ours = {"2:4": {"mma", "gemv", "expand+dot"}, "any": {"sell", "bitmap", "sell scratch+cuBLAS"}}
    expected = {"cuBLAS", "scratch+cuBLAS", *ours[gpu.rows.kind(pattern)]}
    assert names - {"torch CUTLASS", "torch cuSPARSELt"} == expected
    for m in row.measured:
        if m.role != gpu.rows.TORCH:  # torch's own need a GPU
            assert m.failure is None, m
            assert len(m.rounds) == 2
            assert m.median == pytest.approx(10)
            assert m.error < 4e-3


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 0.5), ("60%", 0.4)])
def test_random_weights_have_their_pattern(gpu: SimpleNamespace, pattern: str, kept: float) -> None:
    weight = gpu.weights.Weight(case(gpu, pattern, shape=(128, 256)), torch.device("cpu"))
    assert float((weight.dense != 0).double().mean()) == pytest.approx(kept, abs=0.02)
    if pattern == "2:4":
        assert int((weight.dense.view(128, 64, 4) != 0).sum(-1).max()) == 2


def test_copies_of_a_form_are_other_memory_and_the_same_weight(gpu: SimpleNamespace) -> None:
    one = case(gpu, "50%", 2)
    weight = gpu.weights.Weight(one, torch.device("cpu"))
    x = torch.randn(2, 128).bfloat16()
    for way, words in gpu.candidates.candidates_for(one, (9, 0)).values():
        forms = weight.forms(way, words[0], gpu.weights.form_bytes(way.form(weight, words[0])))
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
