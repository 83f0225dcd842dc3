"""The report: goes to JSON and back, keeps no secret, and knows when it cannot be trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmprune.checkpoint.layout import fingerprint, saved_ties
from llmprune.checkpoint.provenance import command_line, tool_versions
from llmprune.checkpoint.report import REPORT, Report, describe_tensors, totals
from llmprune.errors import UserError, VerificationError
from llmprune.results import SkippedWeight
from tests.builders import tiny_model
from tests.checkpoint.pruning import prune_by_hand


def example(family: str = "mixtral") -> Report:
    model = tiny_model(family)
    before = fingerprint(model)
    pruned = prune_by_hand(model)
    tensors = describe_tensors(model, pruned, before=before)
    return Report(
        versions=tool_versions(torch.device("cpu")),
        command="llmprune prune m",
        config={"method": "magnitude"},
        source={"id": "m", "revision": None},
        pruned=tuple(pruned),
        skipped=(SkippedWeight("model.layers.0.mlp.gate.weight", (4, 32), "router"),),
        totals=totals(pruned, tensors),
        tensors=tensors,
        ties=saved_ties(model),
        before=({"perplexity": 5.5},),
        seconds={"prune": 1.5},
        notes=("a note",),
    )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_a_report_comes_back_as_it_was(tmp_path: Path, family: str) -> None:
    report = example(family)
    report.write(tmp_path)
    assert Report.read(tmp_path) == report


def test_untouched_tensors_keep_the_digest_from_before() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    tensors = describe_tensors(model, prune_by_hand(model), before=before)
    assert tensors["model.norm.weight"].sha256 == before["model.norm.weight"]
    assert not tensors["model.norm.weight"].touched
    name = "model.layers.0.mlp.up_proj.weight"
    assert tensors[name].touched
    assert tensors[name].sha256 != before[name]
    assert tensors[name].zeros == 48 * 32 // 2


def test_totals_count_ties_once() -> None:
    report = example("gpt2")
    model = tiny_model("gpt2")
    assert report.totals["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report.totals["pruned_weights"] == 8
    assert report.totals["pruned_zeros"] * 2 == report.totals["pruned_parameters"]
    # GPT-2's biases begin as zeros
    assert report.totals["zeros"] > report.totals["pruned_zeros"]


def test_a_change_elsewhere_is_found() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    pruned = prune_by_hand(model)
    model.get_parameter("model.norm.weight").data[3] += 1e-3
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        describe_tensors(model, pruned, before=before)


def test_a_tie_that_broke_is_found() -> None:
    model = tiny_model("gpt2")
    before = fingerprint(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(VerificationError, match=r"lm_head\.weight"):
        describe_tensors(model, [], before=before)


def test_no_token_and_no_home_directory_get_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    secret = "hf_" + "Abcdefgh1234" * 3
    report = replace(
        example("llama"),
        command=command_line(
            ["/home/ada/.venv/bin/llmprune", "prune", "/home/ada/m", "--token", "s3cret", "--token=x"]
        ),
        config={"output": "/home/ada/out", "other": ["/home/adamantine", f"token {secret}"]},
        source={"id": "/home/ada/m", "revision": None},
    )
    report.write(tmp_path)
    text = (tmp_path / REPORT).read_text()
    assert json.loads(text)["command"] == "llmprune prune ~/m --token '***' '--token=***'"
    assert "s3cret" not in text
    assert secret not in text
    assert "/home/ada/" not in text
    assert "/home/adamantine" in text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "holds no llmprune_report"),
        ("{", "damaged"),
        ("[1]", "damaged"),
        ('{"a": 1}', "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 3}', "schema 3.*reads up to schema 2: update llmprune"),
    ],
)
def test_a_report_that_cannot_be_used(tmp_path: Path, text: str | None, match: str) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    with pytest.raises(UserError, match=match):
        Report.read(tmp_path)
