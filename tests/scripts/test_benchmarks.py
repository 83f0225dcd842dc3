"""The benchmarks start, and what they hand to each other arrives unchanged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmprune.config import PruneConfig
from llmprune.machine import give_back_memory
from tests.scripts.conftest import Script

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")


@linux
def test_bench_prune_explains_itself(script: Script, repository: Path) -> None:
    assert os.access(repository / "scripts" / "bench_prune", os.X_OK)
    done = CliRunner().invoke(script("bench_prune").main, ["--help"])
    assert done.exit_code == 0
    assert "--peer-python" in done.output


def test_windows_arrive_unchanged_at_the_peer(script: Script, tmp_path: Path) -> None:
    windows = torch.arange(24).view(3, 8).T  # not contiguous: a transpose as it is would be refused or reordered
    script("bench_prune").hand_over(windows, tmp_path / "windows.safetensors")
    peer = script("bench_llmcompressor.py")
    dataset = peer.dataset_of(peer.load_file(tmp_path / "windows.safetensors")["input_ids"])
    assert dataset["input_ids"][:] == windows.tolist()
    assert dataset["attention_mask"][:] == torch.ones(8, 3).tolist()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("2:4", {"sparsity": 0.5, "mask_structure": "2:4"}),
        ("1:4", {"sparsity": 0.75, "mask_structure": "3:4"}),
        ("0.6", {"sparsity": 0.6}),
    ],
)
def test_kept_of_m_becomes_pruned_of_m_for_the_peer(script: Script, ours: str, theirs: dict[str, object]) -> None:
    assert script("bench_llmcompressor.py").amount_of(ours) == theirs


@linux
def test_memory_of_the_work_is_told_from_memory_before_it(script: Script) -> None:
    measured = script("measured.py")
    before = bytearray(64 * 2**20)
    del before
    give_back_memory()  # or what other tests have freed would be taken, and nothing would grow
    with measured.Measured() as cost:
        block = bytearray(b"x" * (32 * 2**20))
        measured.time.sleep(3 * measured.INTERVAL)
        del block
    numbers = cost.numbers()
    assert 30 * 2**20 < numbers["anonymous_peak"] - numbers["anonymous_before"] < 80 * 2**20
    assert numbers["rss_peak"] <= numbers["rss_process_peak"]
    assert numbers["seconds"] >= 3 * measured.INTERVAL


def test_bench_solve_times_every_way(script: Script, tmp_path: Path) -> None:
    bench, file = script("bench_solve"), tmp_path / "solve.json"
    sizes = ["--shape", "16x32", "--rounds", "2", "--device", "cpu"]
    done = CliRunner().invoke(bench.main, [*sizes, "--json", str(file)])
    assert done.exit_code == 0, done.output
    results = json.loads(file.read_text())["results"]
    assert [result["sparsity"] for result in results] == ["2:4", "0.5"]
    assert all(set(result["seconds"]) == set(bench.WAYS) for result in results)
    assert all(len(times) == 2 for result in results for times in result["seconds"].values())
    assert set(bench.KERNELS.values()) <= set(bench.WAYS)


def test_the_cost_of_a_cluster_in_the_document_is_what_the_script_computes(script: Script, repository: Path) -> None:
    """The bytes, which need no solver to be counted; the rest of the table is the same function's."""
    module = script("cluster_cost")
    document = (repository / "docs" / "distributed.md").read_text(encoding="utf-8")
    for method in ("sparsegpt", "balanced"):
        config = PruneConfig(**{"effort" if method == "balanced" else "method": method}, num_samples=512, seq_len=2048)
        sums = [2 * (gpus - 1) / gpus * module._summed(module.Model(), config) / 1e9 for gpus in (1, 8, 64, 512)]
        assert module._line("a GPU moves to add up, GB", sums) in document
        rows = [(gpus - 1) / gpus * module.Model().parameters * 5 / 1e9 for gpus in (1, 8, 64, 512)]
        assert module._line("a GPU moves to gather, GB", rows) in document


def test_more_gpus_cost_less_time_each_but_for_what_they_do_alike(script: Script) -> None:
    module = script("cluster_cost")
    small = ["--hidden", "256", "--ffn", "256", "--heads", "8", "--kv-heads", "2", "--gpus", "1,4", "--seq-len", "64"]
    done = CliRunner().invoke(module.main, small)
    assert done.exit_code == 0, done.output
    rows = [line.strip("| ").split(" | ") for line in done.output.splitlines()[2:]]
    table = {name: [float(value) for value in values] for name, *values in rows}
    alone, four = table["forward, s"]
    assert four == pytest.approx(alone / 4, rel=1e-2)
    assert table["solve, in every GPU, s"][0] == table["solve, in every GPU, s"][1] > 0
    assert table["all-reduce, s"][0] == 0 < table["all-reduce, s"][1]
