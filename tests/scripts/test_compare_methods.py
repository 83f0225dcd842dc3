"""compare_methods: one measurement a cell, found again, and a table that says what it compares."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from llmprune.config import PruneConfig
from llmprune.model import load
from tests.builders import tiny_tokenizer
from tests.scripts.conftest import Script


def _arguments(tiny: Path, *words: str | Path) -> list[str]:
    """The options of compare_methods that make it small, and `words`."""
    text = tiny / "text.txt"
    lengths = ("--num-samples", "4", "--seq-len", "32", "--eval-tokens", "256", "--eval-seq-len", "32")
    given = ("--model", tiny / "model", "--dataset", text, "--eval-dataset", text, "--device", "cpu", *lengths)
    return [str(word) for word in (*given, *words)]


def _run(script: Script, arguments: list[str]) -> Result:
    """compare_methods in this process, which must succeed."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(script("compare_methods").main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def _first_columns(output: str, count: int = 1) -> list[tuple[str, ...]]:
    """The first cells of each row that a table has below its headings."""
    rows = (line.strip("│").split("│") for line in output.splitlines() if line.startswith("│"))
    return [tuple(cell.strip() for cell in row[:count]) for row in rows]


def test_compare_methods_prints_a_table_and_writes_every_cell(repository: Path, tiny: Path, tmp_path: Path) -> None:
    words = ("--row", "magnitude", "--method", "wanda", "--sparsity", "2:4", "--sparsity", "50%", "--seeds", "2")
    done = subprocess.run(
        [
            sys.executable,
            repository / "scripts" / "compare_methods",
            *_arguments(tiny, *words, "--threads", "1", "--json", tmp_path / "cells.json"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    half = [("magnitude", "50%", ""), ("wanda", "50%", "4 × 32")]
    assert _first_columns(done.stdout, 3) == [
        ("dense", "", ""),
        ("magnitude", "2:4", ""),
        ("wanda", "2:4", "4 × 32"),
        *half,
    ]
    cells = json.loads((tmp_path / "cells.json").read_text())
    made = [(cell["label"], cell["sparsity"], cell["seed"]) for cell in cells]
    first, second = ([("wanda", sparsity, seed) for sparsity in ("2:4", "50%")] for seed in (0, 1))
    magnitude = [("magnitude", sparsity, None) for sparsity in ("2:4", "50%")]  # looks at no text: no seeds
    assert made == [("dense", None, None), magnitude[0], first[0], magnitude[1], first[1], *second]
    assert all(cell["seconds"] > 0 for cell in cells[1:])
    assert {"torch", "transformers", "llmprune", "device"} <= cells[0]["made"]["versions"].keys()
    assert "--seeds 2" in cells[0]["made"]["command"]
    assert cells[0]["made"]["threads"] == 1


def test_every_cell_starts_from_the_dense_weights(script: Script, tiny: Path, tmp_path: Path) -> None:
    """Magnitude gives the same number before and after something else was pruned."""
    rows = ("--row", "magnitude", "--row", "sparsegpt", "--row", "magnitude on_indivisible=skip")
    _run(script, _arguments(tiny, *rows, "--json", tmp_path / "cells.json"))
    cells = json.loads((tmp_path / "cells.json").read_text())
    dense, first, other, second = (cell["perplexities"][0]["value"] for cell in cells)
    assert first == second
    assert len({dense, first, other}) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "wnda"), "did you mean 'wanda'"),
        (("--row", "wanda refitt=3"), "did you mean 'refit'"),
        (("--row", "wanda refit=many"), "refit is a whole number; got 'many'"),
        (("--row", "wanda seed=3"), "give --seed"),
        (("--row", "wanda refit=2 refit=3"), "given twice"),
        (("--row", "wanda 'refit"), 'row "wanda \'refit"'),
        (("--row", "wanda", "--reference", "alps"), "--reference is one of the rows (wanda); got 'alps'"),
        (("--leave-out", "5"), "text.txt has 1 documents"),
        (("--print-only",), "--cells"),
    ],
)
def test_compare_methods_refuses_in_one_sentence(script: Script, tiny: Path, words: tuple[str, ...], says: str) -> None:
    done = CliRunner().invoke(script("compare_methods").main, _arguments(tiny, *words))
    assert done.exit_code == 1
    assert says in done.stderr
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("wanda", "wanda"),
        ("method=wanda refit=20", "wanda refit=20"),
        ("balanced", "balanced"),
        ("alps tune=4 dampening_frac=0.05 dense_targets=true", "alps dense_targets=true tune=4 dampening_frac=0.05"),
        ("sparsegpt ignore=q_proj 'ignore=re:.*[kv]_proj'", "sparsegpt ignore=q_proj ignore=re:.*[kv]_proj"),
        ("refit=2", "balanced refit=2"),
    ],
)
def test_a_row_is_any_setting_under_a_readable_label(script: Script, written: str, label: str) -> None:
    row = script("comparison_cells.py").Row.parse(written)
    assert row.label == label
    given = dict(word.split("=") for word in label.split()[1:] if not word.startswith("ignore"))
    config = row.config(sparsity="50%", seed=3)
    assert (config.sparsity, config.seed) == ("50%", 3)
    assert {name: str(getattr(config, name)).lower() for name in given} == given
    assert config.ignore == (("q_proj", "re:.*[kv]_proj") if "ignore" in label else ())


@pytest.fixture
def pruned(script: Script, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(method, number of windows) of every pruning that compare_methods does from now on."""
    comparison, done = script("comparison.py"), []
    prune_layers = comparison.prune_layers

    def counted(model: object, windows: torch.Tensor, config: PruneConfig, **rest: object) -> object:
        done.append((str(config.method), len(windows)))
        return prune_layers(model, windows, config, **rest)

    monkeypatch.setattr(comparison, "prune_layers", counted)
    return done


def test_a_table_goes_on_where_it_was_stopped(
    script: Script, tiny: Path, tmp_path: Path, pruned: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(tiny, "--method", "wanda", "--method", "sparsegpt", "--cells", tmp_path / "cells")
    comparison = sys.modules["comparison"]
    prune_layers = comparison.prune_layers

    def interrupted(model: object, windows: torch.Tensor, config: PruneConfig, **rest: object) -> object:
        if config.method == "sparsegpt":
            raise KeyboardInterrupt
        return prune_layers(model, windows, config, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "prune_layers", interrupted)
        stopped = CliRunner().invoke(script("compare_methods").main, arguments)
    assert stopped.exit_code == 1
    assert pruned == [("wanda", 4)]
    kept = {file: file.read_bytes() for file in (tmp_path / "cells").iterdir()}
    assert [file.name.rpartition("-")[0] for file in sorted(kept)] == ["model-dense", "model-wanda-2of4-4x32-seed-0"]

    done = _run(script, arguments)
    assert pruned == [("wanda", 4), ("sparsegpt", 4)]
    assert {file: file.read_bytes() for file in kept} == kept
    assert _first_columns(done.stdout) == [("dense",), ("wanda",), ("sparsegpt",)]

    again = _run(script, ["--print-only", "--cells", str(tmp_path / "cells")])
    assert again.stdout == done.stdout
    assert len(pruned) == 2


def test_what_decides_the_numbers_makes_another_cell(
    script: Script, tiny: Path, tmp_path: Path, pruned: list[tuple[str, int]]
) -> None:
    cells, other = tmp_path / "cells", tmp_path / "other"
    arguments = _arguments(tiny, "--cells", cells, "--row", "wanda")
    _run(script, arguments)
    for words in (
        ("--row", "wanda refit=2"),
        ("--sparsity", "50%"),
        ("--num-samples", "5"),
        ("--seq-len", "16"),
        ("--eval-tokens", "128"),
    ):
        before = len(pruned)
        _run(script, [*arguments, *words])
        # One more of what may be repeated, where the old cell counts; the others replace what was said.
        assert len(pruned) == before + 1, words
    _run(script, [*arguments, "--seeds", "2"])
    assert len(pruned) == 7

    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    _run(script, [*arguments, "--model", str(other)])
    assert len(pruned) == 8

    shutil.copytree(tiny / "model", tmp_path / "same")
    _run(script, [*arguments, "--model", str(tmp_path / "same")])  # neither its place nor its name counts
    assert len(pruned) == 8


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: text.replace('"seed": 0', '"seed": 1')])
def test_a_damaged_cell_is_an_error_that_names_it(
    script: Script, tiny: Path, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    arguments = _arguments(tiny, "--cells", tmp_path, "--row", "wanda")
    _run(script, arguments)
    [file] = tmp_path.glob("*wanda*")
    file.write_text(damage(file.read_text()))
    for words in (arguments, ["--print-only", "--cells", str(tmp_path)]):
        done = CliRunner().invoke(script("compare_methods").main, words)
        assert done.exit_code == 1
        assert str(file) in done.stderr
        assert "Remove it" in done.stderr


def test_a_cell_is_written_whole_or_not_at_all(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = script("comparison_cells.py").Store(tmp_path / "cells")
    write_text = Path.write_text

    def half(path: Path, text: str, **rest: str) -> None:
        write_text(path, text[: len(text) // 2], **rest)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="no space"):
            store.keep(_cell(script, "wanda", 20.0, perplexities=[]))
    assert store.all() == []


def test_what_is_left_out_is_the_evaluation_and_nothing_else(script: Script, tiny: Path, tmp_path: Path) -> None:
    """Every 5th document consists of one letter that no other one has."""
    file = tmp_path / "text.jsonl"
    documents = ["z" * 60 if number % 5 == 0 else "abcdefghij" * 6 for number in range(1, 21)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    letter = tiny_tokenizer().convert_tokens_to_ids("z")
    options = {"dataset": str(file), "leave_out": 5, "eval_dataset": [], "eval_tokens": 128, "eval_seq_len": 32}
    texts = script("comparison.py").Texts(load(str(tiny / "model")), options)
    [exam] = texts.exams
    assert exam.name == "unseen"
    assert exam.text.texts == ["z" * 60] * 4
    for seed in range(5):
        config = PruneConfig(method="wanda", dataset=str(file), num_samples=25, seq_len=32, seed=seed)
        windows, origin = texts.calibration(config)
        assert windows.shape == (25, 32)  # 800 of the 16 · 62 tokens that stay
        assert not (windows == letter).any()
    assert origin["name"] == "text.jsonl, 1 in 5 left out"


def test_sampled_text_is_the_models_own_and_not_the_same_for_evaluation(
    script: Script, tiny: Path, tmp_path: Path
) -> None:
    arguments = ("--dataset", "sampled", "--eval-dataset", "sampled", "--seeds", "2", "--num-samples", "2")
    done = _run(script, _arguments(tiny, *arguments, "--row", "wanda", "--cells", tmp_path))
    assert "calibrated on sampled" in done.stdout
    cells = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*wanda*"))]
    assert len({cell["identity"]["calibration"] for cell in cells}) == len(cells) == 4
    assert cells[0]["perplexities"][1]["dataset"] == "sampled"


def test_evaluation_is_sampled_with_a_seed_of_its_own(script: Script, tiny: Path) -> None:
    options = {"leave_out": None, "eval_dataset": ["sampled"], "eval_tokens": 64, "eval_seq_len": 32}
    texts = script("comparison.py").Texts(load(str(tiny / "model")), options)
    assert texts.exams[0].text.shape == (2, 32)
    for seed in range(3):
        windows, _ = texts.calibration(PruneConfig(dataset="sampled", num_samples=2, seq_len=32, seed=seed))
        assert not torch.equal(windows, texts.exams[0].text)


def test_sampling_is_free_seeded_and_leaves_the_generator_alone(script: Script, tiny: Path) -> None:
    sampled, loaded = script("comparison.py").sampled, load(str(tiny / "model"))

    def windows(count: int, seed: int, seq_len: int = 32) -> torch.Tensor:
        return sampled(loaded.model, loaded.tokenizer, count, seq_len=seq_len, seed=seed)

    before = torch.get_rng_state()
    short, long = windows(3, 1), windows(20, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert long.shape == (20, 32)
    assert torch.equal(short, long[:3])
    assert not torch.equal(short, windows(3, 2))
    assert (long[:, 0] == 1).all()  # BOS
    assert (long != 2).all()  # no end
    assert windows(500, 0, seq_len=2)[:, 1].unique().numel() > 55  # of 63, not of the 50 likeliest


# The numbers of the table ---------------------------------------------------------------------------------------------


def _cell(script: Script, label: str, value: float, seed: int | None = 0, **rest: object) -> object:
    """A cell of one text with that perplexity."""
    result = SimpleNamespace(value=value, dataset="text")
    dense = label == "dense"
    usual = {"sparsity": None if dense else "2:4", "num_samples": None if dense else 4, "seq_len": 32}
    made = {
        "identity": {"settings": {"sparsity": rest.get("sparsity")}},
        "seconds": 2.0 * value,
        "memory": None,
        "model": "tiny",
    }
    every = {"calibration": None, "made": {}, "perplexities": [result]}
    given = {**usual, **made, **every, **rest}
    return script("comparison_cells.py").Cell(label=label, seed=None if dense else seed, **given)


def test_several_seeds_give_the_error_of_their_mean(script: Script) -> None:
    results = [SimpleNamespace(value=value) for value in (10.0, 11.0, 12.0, 15.0)]
    assert script("comparison_table.py")._mean(results) == "12 ± 1.1"  # standard deviation √(14/3), over √4


def test_what_is_removed_of_the_references_excess_is_compared_seed_by_seed(script: Script) -> None:
    """Dense 10; the reference at 10·e² and 10·e⁴, the row at 10·e and 10·e³: one half and one quarter are gone."""
    table, e = script("comparison_table.py"), math.e
    dense = _cell(script, "dense", 10.0)
    reference = [_cell(script, "sparsegpt", 10 * e ** (2 + 2 * seed), seed) for seed in (0, 1)]
    row = [_cell(script, "alps", 10 * e ** (1 + 2 * seed), seed) for seed in (1, 0)]
    assert table._removed(row, reference, [dense])[0] == pytest.approx([0.25, 0.5])
    assert table._removed(row[:1], reference, [dense])[0] == pytest.approx([0.25])
    assert table._percent([0.25, 0.5]) == "37.5 ± 12 %"
    assert table._percent([0.4]) == "40.0 %"
    assert table._removed(row, reference, []) == [[]]
    # A row without seeds is compared with every one of the reference's.
    magnitude = _cell(script, "magnitude", 10 * e**4, None, num_samples=None)
    assert table._removed([magnitude], reference, [dense])[0] == pytest.approx([-1, 0])
    # Nothing can be said where the reference is as good as the dense model.
    assert table._removed(row, [_cell(script, "sparsegpt", 10.0, 0)], [dense]) == [[]]


def test_the_reference_has_the_same_sparsity_and_windows(script: Script) -> None:
    table = script("comparison_table.py")
    small, large = (_cell(script, "sparsegpt", 20.0, num_samples=count) for count in (4, 8))
    half = _cell(script, "sparsegpt", 15.0, sparsity="50%")
    groups = table._groups([half, large, small])
    assert groups == [[half], [small], [large]]
    assert table._partners(_cell(script, "alps", 12.0, num_samples=8), groups, "sparsegpt") == [large]
    assert table._partners(_cell(script, "alps", 12.0, sparsity="50%"), groups, "sparsegpt") == [half]
    assert table._partners(_cell(script, "alps", 12.0, sparsity="4:8"), groups, "sparsegpt") == ()
    # No place on the reference's curve for a row that has no windows, but one beside its only point.
    magnitude = _cell(script, "magnitude", 30.0, None, num_samples=None)
    assert table._partners(magnitude, groups, "sparsegpt") == ()
    assert table._partners(magnitude, groups[:2], "sparsegpt") == [small]
