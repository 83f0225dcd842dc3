"""The dense path: the inputs that it tells must be the dense model's own, whatever has been pruned meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune import recipe
from llmprune.config import PruneConfig
from llmprune.errors import NumericError, WalkError
from llmprune.pipeline import Watcher, loop, prune_layers
from llmprune.results import PrunedWeight
from llmprune.sparsity.statistics import PairedHessian
from llmprune.sparsity.target import Shift
from llmprune.walk.dense_path import DensePath
from llmprune.walk.lockstep import LayerWalk
from llmprune.walk.survey import survey_layer
from tests.builders import tiny_model
from tests.walk.listed_experts import model_with_listed_experts

CPU = torch.device("cpu")
IDS = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
CONFIG = PruneConfig(method="sparsegpt", dense_targets=True)


def spread(model: Any) -> Any:
    """Weights large enough that layers really change their input: random models are nearly the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def inputs_of_linears(model: nn.Module) -> list[Tensor]:
    """Every input of every linear in a forward of each window, in order of layers and windows as they come."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2).clone()))
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What the walk hands to the statistic: (inputs, dense inputs), batch by batch."""
    pairs: list[tuple[Tensor, Tensor]] = []
    real: Callable[..., None] = PairedHessian.compare

    def noted(self: PairedHessian, inputs: Tensor, dense: Tensor) -> None:
        pairs.append((inputs.clone(), dense.clone()))
        real(self, inputs, dense)

    monkeypatch.setattr(PairedHessian, "compare", noted)
    return pairs


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("memory", [1 << 40, 1])
def test_what_is_compared_with_is_the_dense_models_input(
    family: str, memory: int, compared: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is memory for one waiting batch only, and the others start again and again."""
    monkeypatch.setattr(loop, "free_bytes", lambda _device: memory)
    model = spread(tiny_model(family))
    truth = inputs_of_linears(copy.deepcopy(model))
    prune_layers(model, IDS, CONFIG, device=CPU)
    stations = {"gpt2": 8, "llama": 8, "mixtral": 4, "gpt_oss": 4}[family]  # in two layers; experts are not compared
    assert len(compared) == stations * len(IDS)
    for inputs, dense in compared:
        assert inputs.shape == dense.shape
        assert any(torch.allclose(dense, known, rtol=1e-4, atol=1e-5) for known in truth if known.shape == dense.shape)
    assert any(not torch.allclose(inputs, dense, rtol=1e-2) for inputs, dense in compared)


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # without biases, whose refit makes another problem of it
def test_the_pruned_path_is_the_one_without_a_dense_path(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of zero both give the same weights but for the order in which statistics are summed."""

    def unmoved(weight: Tensor, known: PairedHessian, held: PairedHessian, rows: list[int], **_: Any) -> Shift:
        known.merge(held)
        return Shift(weight, (0.0,) * len(rows), 1, 0)

    monkeypatch.setattr(recipe, "shifted_target", unmoved)
    one, two = spread(tiny_model(family)), spread(tiny_model(family))
    prune_layers(one, IDS, CONFIG, device=CPU)
    prune_layers(two, IDS, PruneConfig(method="sparsegpt"), device=CPU)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert ((a == 0) == (b == 0)).float().mean() > 0.999, name


def test_memory_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = spread(tiny_model("llama")), spread(tiny_model("llama"))
    prune_layers(one, IDS, CONFIG, device=CPU)
    monkeypatch.setattr(loop, "free_bytes", lambda _device: 1)
    prune_layers(two, IDS, CONFIG, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_steps_are_reported_where_they_were_asked_for() -> None:
    aimed = prune_layers(spread(tiny_model("llama")), IDS, CONFIG, device=CPU).weights
    plain = prune_layers(spread(tiny_model("llama")), IDS, PruneConfig(method="sparsegpt"), device=CPU).weights
    assert all(row.step is None for row in plain)
    assert all(row.step is not None and 0 <= row.step <= 1 for row in aimed)
    # Nothing before the first layer's first linears is pruned.
    assert [row.step for row in aimed[:3]] == [0.0, 0.0, 0.0]
    assert any(row.step for row in aimed[3:])


def test_biases_are_refitted_and_listed() -> None:
    model = spread(tiny_model("gpt2"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = prune_layers(model, IDS, CONFIG, device=CPU)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert result.adjusted == {row.parameter.removesuffix("weight") + "bias" for row in result.weights}
    assert changed <= {row.parameter for row in result.weights} | result.adjusted
    assert changed & result.adjusted


@pytest.mark.parametrize("settings", [{"effort": "balanced"}, {"method": "wanda", "dense_targets": True}], ids=str)
def test_a_model_with_large_features_that_never_change_is_pruned_as_any_other(settings: dict[str, Any]) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            for norm in (block.ln_1, block.ln_2):
                norm.weight[[5, 20]] = 0
                norm.bias[[5, 20]] = torch.tensor([100.0, 33.0])
    ids = torch.randint(3, 64, (64, 64), generator=torch.Generator().manual_seed(1))
    for row in prune_layers(model, ids, PruneConfig(**settings), device=CPU).weights:
        weight = model.get_parameter(row.parameter)
        assert torch.isfinite(weight).all()
        assert row.zeros == weight.numel() // 2


def test_one_window_is_too_few_to_choose_a_step() -> None:
    rows = prune_layers(spread(tiny_model("llama")), IDS[:1], CONFIG, device=CPU).weights
    assert all(row.step is None for row in rows)


class Stop(Watcher):
    def pruned(self, weight: PrunedWeight) -> None:
        if "down_proj" in weight.name:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_the_pruned_weights_in_place_and_no_coroutine() -> None:
    model = spread(tiny_model("llama"))
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        prune_layers(model, IDS, CONFIG, device=CPU, watcher=Stop())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_an_error_in_the_dense_run_is_told_with_its_layer() -> None:
    model = spread(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="layer"):
        prune_layers(model, IDS, CONFIG, device=CPU)


def test_experts_in_a_list_of_modules_are_not_compared(compared: list[tuple[Tensor, Tensor]]) -> None:
    """A router that sees pruned attention sends other tokens to them: attention only has a pair. The router, a matrix
    with an output for each of them, is not pruned."""
    model = spread(model_with_listed_experts())
    rows = prune_layers(model, IDS, PruneConfig(), device=CPU).weights
    assert len(compared) == 2 * 2 * len(IDS)
    assert not any("gate.weight" in row.name and "experts" not in row.name for row in rows)
    assert all(len(inputs) == len(dense) == IDS.shape[1] for inputs, dense in compared)
    assert {row.step is None for row in rows if "experts" in row.name} == {True}
    assert {row.step is None for row in rows if "self_attn" in row.name} == {False}


class Chosen(nn.Module):
    """Its second linear takes those tokens only for which the first one gives a positive first feature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = self.first(hidden).flatten(0, 1)
        mine = tokens[:, 0] > 0
        return hidden.flatten(0, 1).index_add(0, mine.nonzero().flatten(), self.second(tokens[mine])).view_as(hidden)


def test_tokens_chosen_behind_the_surveys_back_stop_the_walk_with_a_sentence() -> None:
    """The first window's tokens were all chosen, so its survey takes the linear for one that all tokens meet."""
    layer, generator = Chosen(), torch.Generator().manual_seed(0)
    hidden = [layer.first.weight[:1].repeat(9, 1)[None], torch.randn(1, 9, 8, generator=generator)]
    hidden = [states.detach() for states in hidden]
    names = ["first.weight", "second.weight"]
    schedule, _ = survey_layer(layer, lambda m: m(hidden[0]), names)
    call: Any = lambda m, h, _b: m(h)  # noqa: E731
    with closing(DensePath(layer, list(hidden), call, schedule, capacity=9)) as dense:
        walk = iter(LayerWalk(layer, list(hidden), call, schedule, kind=PairedHessian, capacity=9, dense=dense))
        next(walk).weights[0][0] = torch.eye(8)[7]
        with pytest.raises(WalkError, match="no-dense-targets"):
            next(walk)
