"""scripts/bench_kernels: it measures every candidate of its registry, and notices one that computes something else."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from llmprune.errors import UserError


@pytest.fixture
def registry(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """scripts/kernel_benchmarks.py, with a cache so small that two copies of a weight exceed it."""
    monkeypatch.syspath_prepend(repository / "scripts")
    module = importlib.import_module("kernel_benchmarks")
    monkeypatch.setattr(module, "largest_cache", lambda: 1)
    monkeypatch.setattr(module, "LONG_ENOUGH", 0)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_script_measures_all_candidates(registry: ModuleType, repository: Path, tmp_path: Path) -> None:
    loader = SourceFileLoader("bench_kernels", str(repository / "scripts" / "bench_kernels"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    script = module_from_spec(spec)
    loader.exec_module(script)
    out = tmp_path / "kernels.json"
    options = ["--shape", "33x64", "--pattern", "2:4", "--pattern", "70%", "--threads", "1", "--rounds", "3", "--json"]
    done = CliRunner().invoke(script.main, [*options, str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [case["pattern"] for case in result["cases"]] == ["2:4", "70%"]
    for case in result["cases"]:
        assert [m["candidate"] for m in case["measured"]] == [candidate.name for candidate in registry.CANDIDATES]
        assert all(len(m["rounds"]) == 3 and min(m["rounds"]) > 0 for m in case["measured"])
    assert result["versions"]["torch"] == torch.__version__
    assert "33×64" in done.output


def test_a_wrong_product_is_not_timed(registry: ModuleType) -> None:
    wrong = replace(registry.CANDIDATES[0], name="wrong", prepare=lambda weight, pattern: lambda x: 2 * x @ weight.T)
    with pytest.raises(UserError, match="wrong computes something else"):
        registry.measure(registry.Case(33, 64, "50%"), [wrong], rounds=1, cache=1)
