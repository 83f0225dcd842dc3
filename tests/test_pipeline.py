"""The loop: dtypes, notes, what is left dense, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune import machine
from llmprune.config import PruneConfig
from llmprune.errors import NumericError, UserError
from llmprune.pipeline import Watcher, loop, prune_layers, survey_model
from llmprune.results import PrunedWeight
from tests.builders import tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))


def prune(model: Any, ids: Tensor = IDS, watcher: Watcher | None = None, **settings: Any) -> list[PrunedWeight]:
    return prune_layers(model, ids, PruneConfig(**settings), device=CPU, watcher=watcher).weights


def test_a_16_bit_layer_is_computed_in_float32_where_the_cpu_has_nothing_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pruning bfloat16 weights in float32 equals pruning the float32 model made of them, rounded at the same points."""
    monkeypatch.setattr(machine, "_native_bfloat16", bool)
    half = tiny_model("llama", dtype=torch.bfloat16)
    whole = copy.deepcopy(half).float()
    seen: list[torch.dtype] = []
    half.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))  # type: ignore[union-attr]
    prune(half, method="wanda")
    prune(whole, method="wanda")
    assert torch.float32 in seen
    for (name, stored), (_, truth) in zip(half.named_parameters(), whole.named_parameters(), strict=True):
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, truth.to(torch.bfloat16)), name


def test_zeros_stay_zeros_after_rounding_and_none_is_negative() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    for row in prune(model, method="sparsegpt", sparsity="50%"):
        weight = model.get_parameter(row.parameter)
        assert int((weight == 0).sum()) == row.zeros >= row.shape[0] * row.shape[1] // 2
        assert not (weight[weight == 0].float().signbit()).any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_batches_of_several_windows_give_the_same_masks(family: str) -> None:
    one, three = tiny_model(family), tiny_model(family)
    prune(one, method="wanda")
    prune(three, method="wanda", batch_size=4)  # and a last batch of two
    for (name, a), (_, b) in zip(one.named_parameters(), three.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_seed_is_all_it_takes_to_repeat_a_run() -> None:
    one, two = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    prune(one)
    prune(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_error_is_that_of_the_first_batch() -> None:
    model: Any = tiny_model("llama")
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    inputs: list[Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(IDS[:1])
    hook.remove()
    row = next(row for row in prune(model) if row.name.endswith("layers.0.self_attn.q_proj.weight"))
    after = model.model.layers[0].self_attn.q_proj.weight
    x = inputs[0].double()
    truth = ((x @ (before - after).double().T).norm() / (x @ before.double().T).norm()).item()
    assert row.error == pytest.approx(truth, rel=1e-4)


def test_magnitude_needs_one_batch_only() -> None:
    """Nothing is learned from text, so nothing is spent on it."""
    rows = prune(tiny_model("llama"), method="magnitude", batch_size=2)
    assert {row.tokens for row in rows} == {2 * IDS.shape[1]}


def test_ignored_and_indivisible_weights_stay_dense_and_are_listed() -> None:
    model = tiny_model("llama")  # 32 and 48 inputs
    config = PruneConfig(sparsity="5:32", on_indivisible="skip", ignore=("re:.*layers.0.*q_proj", "v_proj"))
    result = prune_layers(model, IDS, config, device=CPU)
    reasons = {row.name: row.reason for row in result.skipped}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "--ignore"
    assert "model.layers.1.self_attn.q_proj.weight" not in reasons
    assert reasons["model.layers.1.self_attn.v_proj.weight"] == "--ignore"
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "48 inputs do not divide into groups of 5:32"
    for name in reasons:
        assert (model.get_parameter(name) != 0).any()
    assert not {row.name for row in result.weights} & set(reasons)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "settings", [{"method": "wanda"}, {"effort": "fast"}, {"effort": "best", "sparsity": 0.5}, {"tune": 1}], ids=str
)
def test_a_whole_layer_may_stay_dense(layer: int, settings: dict[str, Any]) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = PruneConfig(ignore=(f"re:.*layers.{layer}.*",), **settings)
    result = prune_layers(model, IDS, config, device=CPU)
    assert {row.layer for row in result.weights} == {1 - layer}
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert not any(f"layers.{layer}." in name for name in changed - set(result.adjusted))


def test_everything_ignored_is_an_error_and_not_a_success() -> None:
    with pytest.raises(UserError, match="no weight left to prune"):
        prune(tiny_model("llama"), sparsity="3:5", on_indivisible="skip")


def test_a_dense_model_that_overflows_is_told_before_anything_changes() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(NumericError, match="decoder layer 1 of the dense model"):
        prune(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_overflow_on_a_later_window_names_the_layer_and_the_linear() -> None:
    """The survey's window is fine; another token is not."""
    model: Any = tiny_model("llama")
    ids = IDS.clone()
    ids[4, 3] = 2  # the only window with this token, after others that are fine
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = float("inf")
    with pytest.raises(NumericError, match=r"model\.layers\.0: self_attn\.q_proj\.weight: NaN or inf"):
        prune(model, ids)


def test_pruning_leaves_modes_hooks_and_settings_as_they_were() -> None:
    model: Any = tiny_model("mixtral")
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    experts = model.config._experts_implementation
    prune(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._experts_implementation == experts
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_survey_changes_nothing() -> None:
    model = tiny_model("mixtral")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    survey = survey_model(model, IDS, PruneConfig(), device=CPU)
    assert len(survey.schedules) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("settings", "kept"), [({}, False), ({"tune": 1}, True)])
def test_masks_are_kept_only_for_a_step_that_asks_for_them(
    settings: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(loop.StoredMasks, "add", lambda _self, masks: taken.append(len(masks)))
    with contextlib.suppress(KeyError):  # tuning misses the masks, then
        prune(tiny_model("llama"), method="wanda", **settings)
    assert bool(taken) is kept


def test_tokens_of_experts_and_notes_reach_the_watcher() -> None:
    heard: list[Any] = []

    class Listener(Watcher):
        def start(self, layers: int) -> None:
            heard.append(layers)

        def pruned(self, weight: PrunedWeight) -> None:
            heard.append(weight.name)

        def layer_done(self, index: int) -> None:
            heard.append(index)

    rows = prune(tiny_model("gpt2"), watcher=Listener())
    assert heard == [2, *[r.name for r in rows if r.layer == 0], 0, *[r.name for r in rows if r.layer == 1], 1]
