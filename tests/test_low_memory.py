"""Pruning with one decoder layer in memory: the files are those of the run in memory, byte for byte."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmprune
from llmprune import UserError
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.job import Job, Observer, run
from llmprune.job import prepare as preparation
from llmprune.job.safepoints import SafePoints
from llmprune.pipeline import FinishedLayer
from tests.builders import tiny_model, tiny_tokenizer

IDS = torch.randint(3, 64, (5, 16), generator=torch.Generator().manual_seed(0))
WANDA = {"method": "wanda", "batch_size": 2}


def source(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(family, dtype).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "LICENSE").write_text("yours")
    return folder / "model"


def files(directory: Path) -> dict[str, bytes]:
    """All but the report, its page, the card and the configuration, which name the output and the time."""
    others = ("llmprune_report.json", "report.html", "README.md", "config.json")
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in others}


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("gpt2", torch.float32, {}),  # transposed matrices, tied embeddings, refitted biases
        ("llama", torch.bfloat16, {"max_shard_size": "20KB"}),
        ("mixtral", torch.bfloat16, {}),  # experts that transformers fuses and splits
        ("gpt_oss", torch.float32, {"method": "sparsegpt"}),
        ("llama", torch.float32, {"method": "magnitude", "sparsity": 0.5, "format": "packed"}),
        ("llama", torch.float32, {"permute": True, "tune": 1}),
        ("llama", torch.float32, {"method": "alps", "sparsity": 0.5, "allocation": "owl"}),
    ],
)
def test_the_files_are_those_of_the_run_in_memory(
    family: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = source(tmp_path, family, dtype)
    common = {"dataset": IDS, "effort": None if "method" in settings else "balanced", **settings}
    whole = llmprune.prune(str(model), output_dir=tmp_path / "whole", low_memory=False, **common)
    part = llmprune.prune(
        str(model), output_dir=tmp_path / "part", low_memory=True, activations_dir=tmp_path / "hidden", **common
    )
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert part.model is None
    rows = [[(row.name, row.zeros, row.error) for row in result.report.pruned] for result in (whole, part)]
    assert rows[0] == rows[1]
    assert part.report.tensors == whole.report.tensors
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "part", "hidden"}
    assert not list((tmp_path / "hidden").iterdir())


def test_it_is_evaluated_without_the_whole_model_in_memory(tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    common: dict[str, Any] = {"dataset": IDS, "eval_dataset": [str(tmp_path / "text.txt")], **WANDA}
    reports = [
        llmprune.prune(str(model), output_dir=tmp_path / str(low), low_memory=low, **common).report
        for low in (False, True)
    ]
    for one, other in zip(reports[0].before + reports[0].after, reports[1].before + reports[1].after, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)
    moved = [report.after[0]["divergence"]["kl"] for report in reports]
    assert moved[0] == pytest.approx(moved[1], rel=1e-4)
    assert moved[0] > 1e-4


@pytest.mark.parametrize("settings", [WANDA, {"tune": 1, "effort": "balanced"}])
def test_a_layer_leaves_memory_when_its_turn_is_over(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the help of the garbage collector, which comes when it likes."""
    model, seen, left = source(tmp_path, "llama"), list[weakref.ref[Tensor]](), list[int]()
    finished = SafePoints.finished

    def watched(self: SafePoints, index: int, layer: nn.Module, done: FinishedLayer) -> None:
        left.append(sum(reference() is not None for reference in seen))
        seen.extend(weakref.ref(parameter) for parameter in layer.parameters())
        finished(self, index, layer, done)

    monkeypatch.setattr(SafePoints, "finished", watched)
    gc.disable()
    try:
        llmprune.prune(str(model), dataset=IDS, output_dir=tmp_path / "out", low_memory=True, **settings)
    finally:
        gc.enable()
    assert left == [0, 0]


class Listener(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def test_a_model_that_does_not_fit_stays_on_disk_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(tmp_path, "llama")
    monkeypatch.setattr(preparation, "free_bytes", lambda _: 50_000)
    listener = Listener()
    job = Job(str(model), PruneConfig(method="wanda"), EvaluationConfig(()), dataset=IDS, output_dir=tmp_path / "out")
    result = run(job, listener)
    assert result.model is None
    assert any("do not fit in" in sentence and "--low-memory" in sentence for sentence in listener.said)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"effort": "best"}, "--distill 0"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"model": "in memory"}, "in memory already"),
        ({"model": "model.gguf"}, "--no-low-memory"),
        ({"resume": "always"}, "auto, never"),
    ],
)
def test_what_needs_the_whole_model_is_refused_with_the_cure(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": "model", "output_dir": tmp_path / "out", "dataset": IDS, **settings}
    model = given.pop("model")
    if model == "in memory":
        model = tiny_model("llama")
    elif model.endswith(".gguf"):
        (tmp_path / model).write_bytes(b"GGUF")
        model = str(tmp_path / model)
    with pytest.raises(UserError, match=expected):
        llmprune.prune(model, low_memory=True, **given)
    assert not (tmp_path / "out.partial").exists()
