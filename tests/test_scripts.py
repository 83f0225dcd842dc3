"""The scripts that people run by hand: they start, and what they hand to each other arrives unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from tests.builders import tiny_model, tiny_tokenizer

Script = Callable[[str], ModuleType]

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Import a file of scripts/ by name, with its neighbours in reach as when it is run."""
    monkeypatch.syspath_prepend(repository / "scripts")

    def load(name: str) -> ModuleType:
        loader = SourceFileLoader(Path(name).stem, str(repository / "scripts" / name))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, loader.name, module)  # dataclasses look their module up there
        loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return folder


def _arguments(tiny: Path, *words: str | Path) -> list[str]:
    """The options of compare_methods that make it small, and `words`."""
    text = tiny / "text.txt"
    lengths = ("--num-samples", "4", "--seq-len", "32", "--eval-tokens", "256", "--eval-seq-len", "32")
    given = ("--model", tiny / "model", "--dataset", text, "--eval-dataset", text, "--device", "cpu", *lengths)
    return [str(word) for word in (*given, *words)]


def test_compare_methods_prints_a_table_and_writes_every_row(repository: Path, tiny: Path, tmp_path: Path) -> None:
    words = ("--method", "wanda", "--method", "magnitude", "--sparsity", "2:4", "--sparsity", "50%", "--seeds", "2")
    done = subprocess.run(
        [
            sys.executable,
            repository / "scripts" / "compare_methods",
            *_arguments(tiny, *words, "--json", tmp_path / "rows.json"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    order = [line.split("│")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("│")]
    assert order == ["dense", "wanda", "wanda", "magnitude", "magnitude"]
    written = json.loads((tmp_path / "rows.json").read_text())
    made = [(row["method"], row["sparsity"], row["seed"]) for row in written["rows"]]
    wanda = [("wanda", sparsity, seed) for sparsity in ("2:4", "50%") for seed in (0, 1)]
    assert made == [("dense", None, None), *wanda, ("magnitude", "2:4", 0), ("magnitude", "50%", 0)]
    assert written["seeds"] == [0, 1]
    assert {"torch", "transformers", "llmprune"} <= written["versions"].keys()
    assert "--seeds 2" in written["command"]


def test_every_combination_starts_from_the_dense_weights(script: Script, tiny: Path, tmp_path: Path) -> None:
    """Magnitude gives the same number before and after something else was pruned."""
    methods = ("--method", "magnitude", "--method", "sparsegpt", "--method", "magnitude")
    arguments = _arguments(tiny, *methods, "--json", tmp_path / "rows.json")
    done = CliRunner().invoke(script("compare_methods").main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    dense, first, other, second = (row["perplexities"][0]["value"] for row in rows)
    assert first == second
    assert len({dense, first, other}) == 3


def test_compare_methods_refuses_in_one_sentence(script: Script, tiny: Path) -> None:
    done = CliRunner().invoke(script("compare_methods").main, _arguments(tiny, "--method", "wnda"))
    assert done.exit_code == 1
    assert "did you mean 'wanda'" in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_several_seeds_give_the_error_of_their_mean(script: Script) -> None:
    compare = script("compare_methods")
    results = [SimpleNamespace(value=value) for value in (10.0, 11.0, 12.0, 15.0)]
    assert compare._mean(results) == "12 ± 1.1"  # standard deviation √(14/3), over √4


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
    with measured.Measured() as cost:
        block = bytearray(b"x" * (32 * 2**20))
        measured.time.sleep(3 * measured.INTERVAL)
        del block
    numbers = cost.numbers()
    assert 30 * 2**20 < numbers["anonymous_peak"] - numbers["anonymous_before"] < 80 * 2**20
    assert numbers["rss_peak"] <= numbers["rss_process_peak"]
    assert numbers["seconds"] >= 3 * measured.INTERVAL
