"""A plan is what the run then does: weight by weight, zeros exactly, and the bytes of its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llmprune
from llmprune.checkpoint.convert import pack_checkpoint
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.errors import UserError
from llmprune.plan import Forecast, Request, forecast, show_forecast
from llmprune.plan.speed import Speed
from tests.builders import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds of measuring tell these tests nothing."""
    speed = Speed(forward=1e10, products=1e10, factorings=1e9, moved=1e9, calls=1e5, digested=1e8)
    monkeypatch.setattr("llmprune.plan.overview.measure", lambda *_, **__: speed)


def plan(model: Path | str, *, low_memory: bool | None = None, **settings: Any) -> Forecast:
    config = PruneConfig(**{"num_samples": 4, "seq_len": 32} | settings)
    return forecast(Request(str(model), config, EvaluationConfig(eval_dataset=()), low_memory=low_memory))


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def opt() -> Any:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def tied_llama() -> Any:
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A model, how it is pruned, and something that must be seen in the plan."""

    model: Any
    settings: dict[str, Any] = field(default_factory=dict)
    dense: str = ""


CASES = {
    "llama, tied and bf16": Case(tied_llama, {"method": "wanda", "sparsity": "2:4"}, "embed_tokens"),
    "gpt2, transposed, half of each matrix": Case(
        lambda: tiny_model("gpt2"), {"method": "sparsegpt", "sparsity": "0.5"}, "wte"
    ),
    "opt, one linear ignored": Case(opt, {"method": "magnitude", "sparsity": "2:4", "ignore": ("fc2",)}, "fc2"),
    "mixtral, fused experts, another pattern": Case(
        lambda: tiny_model("mixtral", torch.bfloat16),
        {"method": "wanda", "sparsity": "2:4", "overrides": ("down_proj=4:8", "layers.1.self_attn.=dense")},
        "layers.1.self_attn.q_proj",
    ),
    "gpt-oss, experts stored transposed, sixty percent of each row": Case(
        lambda: tiny_model("gpt_oss"), {"method": "wanda", "sparsity": "60%"}, "router"
    ),
}

PLANNED = ("name", "parameter", "expert", "input_axis", "layer", "shape", "pattern", "zeros", "scope")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_plan_is_what_the_run_then_reports(case: Case, tmp_path: Path) -> None:
    source = save(case.model(), tmp_path / "model")
    planned = plan(source, **case.settings)
    report = llmprune.prune(source, dataset=IDS, output_dir=tmp_path / "dense", **case.settings).report
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")

    def facts(rows: Any) -> list[list[Any]]:
        return sorted([[getattr(row, name) for name in PLANNED] for row in rows], key=lambda row: str(row[0]))

    assert facts(planned.weights) == facts(report.pruned)
    assert set(planned.skipped) == set(report.skipped)
    assert any(case.dense in row.name for row in planned.skipped)
    assert planned.sizes.parameters == report.totals["parameters"]
    assert planned.sizes.zeros == report.totals["pruned_zeros"]
    for kind in ("dense", "packed"):
        written = sum(file.stat().st_size for file in (tmp_path / kind).glob("*.safetensors"))
        assert abs(getattr(planned.sizes, kind) - written) <= 8, kind  # safetensors fills up with up to 7 blanks


def test_no_weight_is_read(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "model")
    whole = plan(source)
    file = source / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header])
    assert plan(source).to_json()["weights"] == whole.to_json()["weights"]
    assert whole.sizes.before is not None


def test_what_a_run_refuses_is_refused_with_the_same_sentence(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "model")
    for settings in ({"sparsity": "3:7"}, {"ignore": ("fc9",)}, {"overrides": ("fc9=dense",)}):
        with pytest.raises(UserError) as planned:
            plan(source, **settings)
        with pytest.raises(UserError) as run:
            llmprune.prune(source, dataset=IDS, **settings)
        assert str(planned.value) == str(run.value)
    skipped = plan(source, sparsity="3:7", on_indivisible="skip", overrides=("down_proj=2:4",))
    assert {row.pattern for row in skipped.weights} == {"2:4"}
    with pytest.raises(UserError, match="does not exist"):
        plan(tmp_path / "nowhere")


def test_more_layers_take_memory_only_where_weights_are_held(tmp_path: Path) -> None:
    plans = []
    for layers in (2, 6):
        config = FAMILIES["llama"]()
        config.num_hidden_layers = layers
        model = transformers.AutoModelForCausalLM.from_config(config)
        plans.append(plan(save(model, tmp_path / str(layers)), method="sparsegpt"))
    pruned = [sum(row.shape[0] * row.shape[1] * 4 for row in each.weights) for each in plans]
    own = [each.memory.peak_bytes - base(each) for each in plans]
    assert own[1] - own[0] == pruned[1] - pruned[0]
    least = [each.least_memory.peak_bytes - base(each) for each in plans if each.least_memory is not None]
    assert least[0] == least[1] < own[0]


def base(planned: Forecast) -> int:
    return planned.memory.stages["prune"][0].nbytes


def test_the_terms_of_the_memory_follow_the_steps(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "model")
    names = {
        effort: {term.name for term in plan(source, effort=effort).memory.stages["prune"]}
        for effort in ("fast", "balanced")
    }
    assert "its dense weights, to compare with" in names["balanced"] - names["fast"]
    assert "statistics (PairedHessian)" in names["balanced"]
    assert "statistics (Hessian)" in names["fast"]
    stages = plan(source, effort="best").memory.stages
    assert "distill" in stages
    converted = forecast(
        Request(str(source), PruneConfig(method="wanda", seq_len=32), EvaluationConfig(()), dtype="bfloat16")
    )
    assert "all weights, converted to bfloat16" in {term.name for term in converted.memory.stages["prune"]}


def test_experts_that_wait_hold_their_statistics_together(tmp_path: Path) -> None:
    source = save(tiny_model("mixtral"), tmp_path / "model")
    stages = plan(source, method="sparsegpt", num_samples=1).memory.stages  # too few tokens for any expert
    (planned,) = (term.nbytes for term in stages["prune"] if term.name == "statistics (Hessian)")
    sizes, experts = json.loads((source / "config.json").read_text()), 4
    waiting = [4 * inputs * (inputs + 1) for inputs in (sizes["hidden_size"], sizes["intermediate_size"])]
    assert planned == (experts + 1) * sum(waiting)  # and the stack's pooled ones


def test_an_allocation_that_measures_is_said_to_be_open(tmp_path: Path) -> None:
    planned = plan(save(tiny_model("llama"), tmp_path / "model"), sparsity="0.5", method="wanda", allocation="owl")
    assert not planned.settled
    assert "measures on the weights" in planned.notes[0]


def test_levels_that_will_be_chosen_among_are_left_open_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sparsity": "2:4", "budget": 0.3, "levels": ("dense", "4:8")}
    planned = plan(save(tiny_model("llama"), tmp_path / "model"), effort="best", **settings)
    assert "30% of all weights zero" in planned.notes[0]


def test_the_plan_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    planned = plan(save(tiny_model("mixtral", torch.bfloat16), tmp_path / "model"))
    show_forecast(planned, every=False)
    shown = capsys.readouterr().out
    assert "model.layers.*.mlp.experts.down_proj[*]" in shown
    assert "│ 8 │" in shown  # two layers of four experts
    assert "dense: a router" in shown
    for words in ("with --format packed", "peak memory", "the solver's work", "an estimate", "vLLM", "llama.cpp"):
        assert words in shown
    show_forecast(planned, every=True)
    assert "model.layers.1.mlp.experts.down_proj[3]" in capsys.readouterr().out
    document = json.loads(json.dumps(planned.to_json(), default=str))
    assert document["config"] == json.loads(json.dumps(asdict(planned.request.config)))
    assert sum(row["decision"] == "prune" for row in document["weights"]) == len(planned.weights)
