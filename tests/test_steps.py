"""The steps around a method, on whole tiny models: permutation, distillation, and all together through a job."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llmprune
from llmprune.checkpoint.verify import verify
from llmprune.config import PruneConfig
from llmprune.pipeline import Watcher, prune_layers
from llmprune.pipeline import distill as distillation
from llmprune.pipeline.distill import Predictions, distill, divergence, predictions
from llmprune.pipeline.loop import _float64
from llmprune.results import PrunedWeight
from llmprune.sparsity.pattern import NM
from llmprune.sparsity.permutation import search
from tests.builders import tiny_model, tiny_tokenizer
from tests.walk.test_dense_path import CPU, IDS, spread

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 40, "pack my box with five dozen liquor jugs! " * 40]


def run(model: Any, **settings: Any) -> Any:
    return prune_layers(model, IDS, PruneConfig(**settings), device=CPU)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


# Permutation ----------------------------------------------------------------------------------------------------------


def unpruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups come and go without a change: what is left is the permutation."""

    def nothing(*_: Any, **__: Any) -> list[PrunedWeight]:
        return []

    monkeypatch.setattr("llmprune.pipeline.loop.prune_group", nothing)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_oss"])
def test_features_change_places_and_the_model_stays_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unpruned(monkeypatch)
    model = spread(tiny_model(family))
    before, dense = logits(model), copy.deepcopy(model)
    result = run(model, method="magnitude", permute=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(name))}
    assert changed
    unlisted = {name for name in changed if not name.endswith("weight") and "proj" not in name}
    assert result.adjusted >= {name for name in unlisted if name.endswith("bias")}


def test_the_pattern_keeps_more() -> None:
    """Magnitude keeps the largest of each group, so the sum of what is kept shows what the order is worth."""
    kept = []
    for permute in (False, True):
        model = spread(tiny_model("llama"))
        run(model, method="magnitude", permute=permute)
        kept.append(sum(layer.mlp.down_proj.weight.square().sum().item() for layer in model.model.layers))
    assert kept[1] > 1.02 * kept[0]


def test_a_model_whose_features_cannot_move_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"dataset": IDS, "num_samples": len(IDS), "seq_len": 24, "method": "magnitude"}
    assert not llmprune.prune(tiny_model("llama"), permute=True, **settings).report.notes
    monkeypatch.setattr("llmprune.pipeline.permute.find_freedoms", lambda *_: [])
    (note,) = llmprune.prune(tiny_model("llama"), permute=True, **settings).report.notes
    assert note.startswith("permute did nothing")
    assert not llmprune.prune(tiny_model("llama"), **settings).report.notes


def llama_with_inner_features(count: int) -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**settings, intermediate_size=count, num_hidden_layers=2)
    return spread(transformers.LlamaForCausalLM(config).eval())


def test_weights_without_groups_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """An override has said so; here 50 inputs would not even divide into groups of 4."""
    unpruned(monkeypatch)
    model = llama_with_inner_features(50)
    dense = copy.deepcopy(model)
    run(model, method="magnitude", permute=True, overrides={"down_proj": "50%"})
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(name))}
    assert {name.rpartition("self_attn.")[2] for name in changed} == {"v_proj.weight", "o_proj.weight"}


def test_the_order_is_the_best_one_for_the_patterns_of_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[NM] = []

    def listening(scores: Tensor, pattern: NM, positions: Tensor) -> Any:
        asked.append(pattern)
        return search(scores, pattern, positions)

    monkeypatch.setattr("llmprune.pipeline.permute.search", listening)
    run(
        llama_with_inner_features(48),
        method="magnitude",
        permute=True,
        overrides={"model.layers.1.mlp.down_proj": "4:8"},
    )
    assert sorted(map(str, asked)) == ["2:4", "2:4", "2:4", "4:8"]


# Distillation ---------------------------------------------------------------------------------------------------------


def test_the_divergence_is_the_full_one_where_all_classes_are_listed() -> None:
    model, other = spread(tiny_model("llama")), tiny_model("llama")
    (wanted,) = predictions(model, [IDS[:2]])  # 64 classes, all listed
    truth, own = logits(model)[:2].double().log_softmax(-1), logits(other)[:2].double().log_softmax(-1)
    full = (truth.exp() * (truth - own)).sum(-1).mean()
    assert divergence(logits(other)[:2], wanted).item() == pytest.approx(full.item(), rel=2e-3)
    assert divergence(logits(model)[:2], wanted).item() == pytest.approx(0, abs=1e-3)  # float16


def test_with_fewer_classes_it_is_never_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = spread(tiny_model("llama")), tiny_model("llama")
    (all_classes,) = predictions(model, [IDS])
    monkeypatch.setattr("llmprune.pipeline.distill.TOP", 5)
    (some,) = predictions(model, [IDS])
    assert some.tokens.shape == (6, 24, 5)
    assert 0 < divergence(logits(other), some) < divergence(logits(other), all_classes)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_distillation_brings_the_predictions_nearer_and_keeps_the_pattern(family: str) -> None:
    dense, model, plain = (spread(tiny_model(family)) for _ in range(3))
    result = run(model, method="wanda", distill=4)
    run(plain, method="wanda")
    part = result.tuned[-1]
    assert part.part == "model"
    assert part.after < part.before
    (wanted,) = predictions(dense, [IDS])
    assert divergence(logits(model), wanted) < divergence(logits(plain), wanted)
    for row in result.weights:
        weight = model.get_parameter(row.parameter).data
        weight = weight if row.expert is None else weight[row.expert]
        rows = weight if row.input_axis == 1 else weight.T
        assert ((rows.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert int((weight == 0).sum()) == row.zeros


def test_distillation_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []

    class Listening(Watcher):
        def distilled(self, done: int, total: int) -> None:
            told.append((done, total))

    model = spread(tiny_model("llama"))
    result = prune_layers(model, IDS, PruneConfig(method="wanda", distill=2), device=CPU, watcher=Listening())
    (part,) = result.tuned
    total = told[0][1]
    assert told == [(done, total) for done in range(1, len(told) + 1)]
    assert total == 2 * (len(IDS) - 1)
    assert len(told) == part.passes * total // 2


def test_distillation_changes_nothing_else() -> None:
    dense, model = (spread(tiny_model("llama")) for _ in range(2))
    result = run(model, method="wanda", distill=2)
    pruned = {row.parameter for row in result.weights}
    for name, parameter in model.named_parameters():
        assert name in pruned or torch.equal(parameter, dense.get_parameter(name)), name
        assert parameter.grad is None


def test_a_float16_model_is_distilled_and_stays_float16() -> None:
    """GPT-2 has layer norms, which a CPU does not compute in float16 under bfloat16's autocast."""
    model = spread(tiny_model("gpt2", dtype=torch.float16))
    result = run(model, method="wanda", distill=2)
    assert result.tuned[-1].after < result.tuned[-1].before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_single_batch_refits_no_bias() -> None:
    """There is no dense run beside it, from whose inputs a bias would be made."""
    dense, model = (spread(tiny_model("gpt2")) for _ in range(2))
    result = prune_layers(model, IDS, PruneConfig(batch_size=len(IDS), permute=False), device=CPU)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, dense.get_parameter(name))}
    assert changed == {row.parameter for row in result.weights}
    assert not result.adjusted


@pytest.mark.parametrize("step", [{"dense_targets": True}, {"tune": 2}, {"distill": 2}, {"effort": "best"}])
def test_a_single_batch_is_not_paid_for_twice_and_that_is_said(step: dict[str, Any]) -> None:
    """None can be held out to decide: what is left is the method, and the report says so."""
    settings: dict[str, Any] = {"batch_size": len(IDS), **({} if "effort" in step else {"method": "wanda"}), **step}
    config = PruneConfig(**settings)
    result = prune_layers(spread(tiny_model("llama")), IDS, config, device=CPU)
    assert not result.tuned
    assert all(row.step is None for row in result.weights)
    assert len(result.notes) == 1
    assert "smaller --batch-size" in result.notes[0]


def test_what_the_dense_model_predicts_is_not_rounded_to_its_dtype() -> None:
    """They are kept in float16, finer than bfloat16: a log-probability of -5 would be off by up to 0.016 there."""
    model = spread(tiny_model("llama")).bfloat16()
    (wanted,) = predictions(model, [IDS])
    truth = logits(model).double().log_softmax(-1).gather(-1, wanted.tokens.long())
    assert (wanted.logs.double() - truth).abs().max() < 0.003


def test_masks_go_where_the_model_is() -> None:
    """They wait on the CPU, whatever device the layers were pruned on."""
    model = spread(tiny_model("llama")).to("meta")
    masks = {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.bool)}
    seen: list[torch.device] = []

    def tuned(_part: str, weights: Any, *_: Any, **__: Any) -> None:
        seen.extend(mask.device for _, mask in weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "tune", tuned)
        distill(model, [], [], masks=masks, held_out=frozenset(), passes=1)
    assert seen == [torch.device("meta")]


def test_the_proof_of_a_permutation_is_made_where_the_layers_are_computed() -> None:
    meta = torch.device("meta")
    assert _float64(torch.ones(2), meta).device == meta
    assert _float64(torch.ones(2).bfloat16(), CPU).dtype == torch.float64
    assert _float64(torch.ones(2, dtype=torch.int32), CPU).dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"effort": "balanced"}, {"effort": "best"}, {"effort": "best", "sparsity": 0.5}])
def test_a_gpu_does_all_that_a_cpu_does(settings: dict[str, Any]) -> None:
    """The same features change places, and every step is made."""
    one, two = spread(tiny_model("llama")), spread(tiny_model("llama"))
    config = PruneConfig(**settings)
    here = prune_layers(one, IDS, config, device=CPU)
    there = prune_layers(two, IDS, config, device=torch.device("cuda"))
    assert len(here.tuned) == len(there.tuned)
    assert [row.zeros for row in here.weights] == [row.zeros for row in there.weights]
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert b.device == CPU
        assert ((a == 0) == (b == 0)).float().mean() > 0.9, name
    assert (logits(one) - logits(two)).square().mean() < 0.1 * logits(one).square().mean()


def test_one_batch_alone_decides_nothing_and_is_not_trained_on() -> None:
    model = spread(tiny_model("llama"))
    before = copy.deepcopy(model)
    (wanted,) = predictions(model, [IDS])
    wrong = Predictions(wanted.tokens, wanted.logs)
    masks = {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.bool)}
    part = distill(model, [IDS], [wrong], masks=masks, held_out=frozenset({0}), passes=3)
    assert part.after == part.before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


# Allocation -----------------------------------------------------------------------------------------------------------


def test_zeros_go_where_they_cost_least_and_their_number_is_exact() -> None:
    model = spread(tiny_model("llama"))
    result = run(model, method="sparsegpt", sparsity="70%", allocation="error")
    shares = {row.zeros / (row.shape[0] * row.shape[1]) for row in result.weights}
    assert max(shares) - min(shares) > 0.05
    assert all(0.54 < share < 0.86 for share in shares)
    sizes = [row.shape[0] * row.shape[1] for row in result.weights]
    assert sum(row.zeros for row in result.weights) == sum(round(0.7 * size) for size in sizes)


def test_overrides_speak_for_single_weights() -> None:
    model = spread(tiny_model("llama"))
    result = run(model, method="wanda", overrides={"down_proj": "4:8", "layers.0.self_attn.": "dense"})
    patterns = {row.name: row.pattern for row in result.weights}
    assert patterns["model.layers.1.mlp.down_proj.weight"] == "4:8"
    assert patterns["model.layers.1.mlp.up_proj.weight"] == "2:4"
    assert not any("layers.0.self_attn" in name for name in patterns)
    assert sum(row.reason == "kept dense by an override" for row in result.skipped) == 4


def test_some_linears_stay_dense_under_a_budget() -> None:
    model = spread(tiny_model("llama"))
    result = run(model, method="wanda", allocation="error", budget=0.4)
    assert any(row.reason == "kept dense by the allocation" for row in result.skipped)
    assert {row.pattern for row in result.weights} == {"2:4"}


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_every_effort_ends_in_a_checkpoint_that_verifies(family: str, effort: str, tmp_path: Path) -> None:
    result = llmprune.prune(
        spread(tiny_model(family)),
        tokenizer=tiny_tokenizer(),
        dataset=TEXTS,
        num_samples=10,
        seq_len=24,
        effort=effort,
        output_dir=tmp_path / "out",
    )
    proof = verify(tmp_path / "out")
    assert proof.ok, proof.checks
    assert result.report.config["effort"] == effort
    touched = {name for name, held in result.report.tensors.items() if held.touched}
    assert any(name.endswith("bias") for name in touched) == (family == "gpt2" and effort != "fast")
    assert bool(result.report.tuned) == (effort == "best")
