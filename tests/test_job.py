"""The whole job from Python: what it takes, what it refuses early, and what is safe when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

import llmprune
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.errors import UserError
from llmprune.job import Job, Observer, run
from llmprune.job.prepare import _base_name
from tests.builders import tiny_model, tiny_tokenizer

ANIMALS, PLACES = ("cat", "dog", "hen", "cow"), ("mat", "roof", "cart", "wall", "hill", "sofa")
TEXTS = [f"the {animal} sat on the {place} and did not move all day" for animal in ANIMALS for place in PLACES]
IDS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
FEW: dict[str, Any] = {"num_samples": 4, "seq_len": 32}


def masks(model: Any) -> list[Tensor]:
    return [
        parameter == 0 for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2
    ]


def test_a_model_in_memory_is_pruned_in_place_and_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    result = llmprune.prune(model, tokenizer=tiny_tokenizer(), dataset=TEXTS, sparsity=0.5, **FEW)
    assert result.model is model
    assert result.directory is None
    assert result.report.totals["pruned_zeros"] * 2 == result.report.totals["pruned_parameters"]
    assert not list(tmp_path.iterdir())


def test_texts_come_as_list_data_set_or_file_and_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sources: list[Any] = [TEXTS, datasets.Dataset.from_dict({"text": TEXTS}), str(tmp_path / "texts.jsonl")]
    models = [tiny_model("llama") for _ in sources]
    for model, source in zip(models, sources, strict=True):
        llmprune.prune(model, tokenizer=tiny_tokenizer(), dataset=source, method="wanda", **FEW)
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks(models[0]), masks(model), strict=True))


def test_an_evaluation_on_the_calibration_text_is_noted(tmp_path: Path) -> None:
    """As for a data set that has nothing but a train split."""
    for name in ("texts.jsonl", "others.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    notes = []
    for name in ("texts.jsonl", "others.jsonl"):
        settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "method": "wanda", "eval_tokens": 64, **FEW}
        source, exam = str(tmp_path / "texts.jsonl"), str(tmp_path / "." / ".." / tmp_path.name / name)
        result = llmprune.prune(tiny_model("llama"), dataset=source, eval_dataset=(exam,), **settings)
        notes.append(result.report.notes)
    assert notes[1] == ()
    assert "measured on texts.jsonl, the text that the calibration windows were drawn from" in notes[0][0]


def test_a_directory_without_a_tokenizer_is_pruned_with_token_ids_only(tmp_path: Path) -> None:
    """transformers would make a tokenizer that knows no word."""
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2 holds no tokenizer, which turns text into tokens"):
        llmprune.prune(tmp_path / "gpt2", dataset=TEXTS, method="wanda", **FEW)
    result = llmprune.prune(tmp_path / "gpt2", dataset=IDS, method="wanda", output_dir=tmp_path / "out")
    assert result.tokenizer is None
    assert not list((tmp_path / "out").glob("*token*"))


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="go up to 99, and the model knows 64, 0 to 63"):
        llmprune.prune(tiny_model("llama"), dataset=torch.full((2, 16), 99), method="wanda")


def test_the_report_tells_the_call_and_nothing_of_the_program_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--wandb-key", "secret"])
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "method": "wanda", "dataset": tmp_path / "texts.txt"}
    result = llmprune.prune(tiny_model("llama"), output_dir=tmp_path / "out", **settings, **FEW)
    told = "llmprune.prune(LlamaForCausalLM, dataset='texts.txt', method='wanda', num_samples=4, seq_len=32)"
    assert result.report.command == told
    assert result.report.config["dataset"] == str(tmp_path / "texts.txt")
    assert told in (tmp_path / "out" / "README.md").read_text()
    assert "secret" not in (tmp_path / "out" / "llmprune_report.json").read_text()
    texts = llmprune.prune(tiny_model("llama"), **{**settings, "dataset": TEXTS}, ignore=["q_proj"], **FEW)
    assert "dataset=list, method='wanda', ignore=['q_proj']" in texts.report.command


def test_a_gguf_file_gives_its_own_name_and_not_that_of_a_blob(tmp_path: Path) -> None:
    """As the Hub's cache has it: a link with a name to a file that is called after its hash."""
    (tmp_path / "0123abcdef").write_text("weights")
    (tmp_path / "small.Q4_1.gguf").symlink_to(tmp_path / "0123abcdef")
    assert _base_name(str(tmp_path / "small.Q4_1.gguf")) == "small.Q4_1"
    assert _base_name("me/small") == "small"


def test_seeds_choose_other_windows() -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    for seed, model in enumerate((one, two)):
        llmprune.prune(model, tokenizer=tiny_tokenizer(), dataset=TEXTS, method="wanda", seed=seed, **FEW)
    assert not all(torch.equal(a, b) for a, b in zip(masks(one), masks(two), strict=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dataset": TEXTS}, "needs its tokenizer"),
        ({"dataset": IDS, "eval_dataset": ["wikitext2"]}, "a model in memory needs its tokenizer"),
        ({"dataset": IDS, "sparsty": "2:4"}, "did you mean 'sparsity'"),
        ({"dataset": IDS, "push_to_hub": ""}, "give output_dir too"),
        ({"dataset": IDS, "hub_create_pr": True}, "are about a push: give push_to_hub too"),
        ({"dataset": IDS, "push_to_hub": "m", "hub_revision": "v1", "hub_create_pr": True}, "not both"),
        ({"dataset": IDS.float()}, "integer"),
        ({"dataset": IDS[0]}, "shape"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_changes(settings: dict[str, Any], expected: str) -> None:
    model = tiny_model("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match=expected):
        llmprune.prune(model, **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_cast_with_its_buffers_is_saved_with_a_note(tmp_path: Path) -> None:
    """`model.half()` rounds rotary frequencies too; the files are right, only the model in memory was not."""
    model = tiny_model("llama").to(torch.bfloat16)
    report = llmprune.prune(model, dataset=IDS, output_dir=tmp_path / "out").report
    assert any("buffers must have been cast" in note for note in report.notes)
    assert llmprune.verify(tmp_path / "out").ok


class InterruptedAt(Observer):
    def __init__(self, stage: str) -> None:
        self.name = stage

    def stage(self, name: str) -> None:
        if name == self.name:
            raise KeyboardInterrupt


def interrupted_job(tmp_path: Path, stage: str) -> KeyboardInterrupt:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = str(tmp_path / "text.txt")
    job = Job(
        str(tmp_path / "model"),
        config=PruneConfig(dataset=text, **FEW),
        evaluation=EvaluationConfig(eval_dataset=(text,), eval_tokens=64),
        output_dir=tmp_path / "out",
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        run(job, InterruptedAt(stage))
    return caught.value


@pytest.mark.parametrize("stage", ["evaluate dense", "prune", "save and verify"])
def test_an_interrupt_before_the_end_of_saving_leaves_nothing(tmp_path: Path, stage: str) -> None:
    assert not interrupted_job(tmp_path, stage).args
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


def test_an_interrupt_after_saving_says_where_the_model_is(tmp_path: Path) -> None:
    assert interrupted_job(tmp_path, "evaluate pruned").args == (str(tmp_path / "out"),)
    assert llmprune.verify(tmp_path / "out").ok
