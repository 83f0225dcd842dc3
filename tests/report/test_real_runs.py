"""Reports of real runs of every kind are what the JSON Schema says, and each run leaves its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import llmprune
from llmprune.checkpoint.convert import pack_checkpoint
from llmprune.checkpoint.push import Pushed
from llmprune.checkpoint.report import Report
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.errors import NumericError
from llmprune.eval.measure import Measures
from llmprune.job import Job, Observer, prepare, run, stages
from llmprune.report.document import PAGE, REPORT, json_schema
from tests.builders import tiny_model, tiny_tokenizer

TEXTS = [f"the {animal} sat on the {place} and did not move all day" for animal in "abcdefgh" for place in "xyz"]

FEW: dict[str, Any] = {"num_samples": 4, "seq_len": 32, "method": "magnitude"}

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"method": "wanda"}),
    "packed, tuned and distilled": ("llama", {"format": "packed", "method": "wanda", "tune": 1, "distill": 1}),
    "experts, unstructured, not evaluated": ("mixtral", {"sparsity": 0.5, "method": "magnitude", "eval_dataset": ()}),
    "transposed, by effort, one weight left dense": ("gpt2", {"effort": "fast", "ignore": ("c_fc",)}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_real_report_is_what_the_schema_says(tmp_path: Path, run: str) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    family, settings = RUNS[run]
    result = llmprune.prune(
        tiny_model(family),
        tokenizer=tiny_tokenizer(),
        dataset=TEXTS,
        output_dir=tmp_path / "out",
        **{
            "num_samples": 4,
            "seq_len": 32,
            "eval_dataset": (str(tmp_path / "text.txt"),),
            "eval_tokens": 128,
            **settings,
        },
    )
    document = json.loads((tmp_path / "out" / REPORT).read_text())
    Draft202012Validator(json_schema()).validate(document)
    assert Report.read(tmp_path / "out") == Report.from_json(document)
    assert bool(document["after"]) == bool(document["generations"]) == (settings.get("eval_dataset") != ())
    assert len(document["tuned"]) == (5 if "tune" in settings else 0)
    assert [row["reason"] for row in document["skipped"] if "c_fc" in row["name"]] == (
        ["--ignore"] * 2 if "ignore" in settings else []
    )
    page = (tmp_path / "out" / PAGE).read_text()
    assert f"{result.report.totals['pruned_weights']} weights in 2 decoder layers" in page
    assert ("of dense, packed" in page) == ("format" in settings)
    assert "as large as dense" in page or "format" in settings


def _no_page(run: Any) -> str:
    raise RuntimeError("no fonts\nhere.")


def test_a_page_that_cannot_be_drawn_costs_neither_the_model_nor_the_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said at once, in the result and in the report. So it is where a checkpoint is packed."""
    said: list[str] = []
    seen = Observer()
    monkeypatch.setattr(seen, "say", said.append)
    monkeypatch.setattr("llmprune.report.page.run_page", _no_page)
    monkeypatch.setattr(prepare, "check_access", lambda asked, name: asked)
    monkeypatch.setattr(
        stages, "push", lambda directory, to, say: Pushed("url", "commit", len(list(directory.iterdir())))
    )
    job = {"model": tiny_model("llama"), "tokenizer": tiny_tokenizer(), "output_dir": tmp_path / "out"}
    config = PruneConfig(dataset=TEXTS, **FEW)
    result = run(Job(config=config, evaluation=EvaluationConfig(()), push_to_hub="ada/m", **job), seen)
    trouble = "report.html could not be drawn (RuntimeError: no fonts here); `llmprune report DIR` tries again"
    assert f"{trouble}." in said
    assert trouble in result.report.notes
    assert Report.read(tmp_path / "out").notes == result.report.notes
    assert not (tmp_path / "out" / PAGE).exists()
    assert result.commit == "commit"
    (tmp_path / "out" / PAGE).write_text("of the dense files")
    assert pack_checkpoint(tmp_path / "out", tmp_path / "packed").notes == (trouble,)
    assert not (tmp_path / "packed" / PAGE).exists()


def test_what_goes_wrong_after_the_model_was_saved_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise NumericError("window 1 of 4: the cross-entropy is nan.")

    monkeypatch.setattr(Measures, "against", fail)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    out, evaluated = tmp_path / "out", {"eval_dataset": (str(tmp_path / "text.txt"),), "eval_tokens": 128}
    with pytest.raises(NumericError, match=rf"is nan\. The pruned model was saved before, in {re.escape(str(out))}\.$"):
        llmprune.prune(
            tiny_model("gpt2"), tokenizer=tiny_tokenizer(), dataset=TEXTS, output_dir=out, **FEW, **evaluated
        )
    assert llmprune.verify(out).ok


def test_packing_draws_the_page_again_with_the_new_size(tmp_path: Path) -> None:
    llmprune.prune(tiny_model("llama"), tokenizer=tiny_tokenizer(), dataset=TEXTS, output_dir=tmp_path / "out", **FEW)
    pack_checkpoint(tmp_path / "out", tmp_path / "packed")
    assert "as large as dense" in (tmp_path / "out" / PAGE).read_text()
    assert "of dense, packed" in (tmp_path / "packed" / PAGE).read_text()
