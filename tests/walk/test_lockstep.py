"""The lockstep walk against the naive way, and against everything that a layer can do to it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.errors import NumericError, WalkError
from llmprune.pipeline import Watcher, prune_layers
from llmprune.sparsity.statistics import FeatureNorm, Hessian
from llmprune.walk.lockstep import Group, LayerWalk
from llmprune.walk.survey import survey_layer
from tests import builders
from tests.walk import naive

CPU = torch.device("cpu")


def windows(count: int = 6, length: int = 24) -> Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(1))


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that layers really change their input: random models are nearly the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_the_walk_equals_one_forward_per_linear(family: str, method: str, sparsity: str) -> None:
    model = spread(builders.tiny_model(family))
    slow = copy.deepcopy(model)
    config = PruneConfig(method=method, sparsity=sparsity)
    naive.prune_naively(slow, windows(), config)
    prune_layers(model, windows(), config, device=CPU)
    for (name, fast), (_, true) in zip(model.named_parameters(), slow.named_parameters(), strict=True):
        assert torch.equal(fast == 0, true == 0), name
        torch.testing.assert_close(fast, true, rtol=1e-4, atol=1e-5, msg=name)


def test_dense_inputs_would_give_other_weights() -> None:
    """The test above can fail: a linear calibrated on the dense layer's inputs gets another mask."""
    model = spread(builders.tiny_model("llama"))
    dense, config, name = copy.deepcopy(model), PruneConfig(method="wanda"), "model.layers.0.mlp.down_proj"
    prune_layers(model, windows(), config, device=CPU)
    naive._prune_one(dense, dense.get_submodule(name), windows(), config)
    assert not torch.equal(model.get_submodule(name).weight == 0, dense.get_submodule(name).weight == 0)


class Wrapped(nn.Module):
    """A layer given as a function of itself, for layers that models do not have but could."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.body(self, hidden)


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=False)


def batches(count: int = 5, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 7, width, generator=generator) for _ in range(count)]


def walk_over(layer: nn.Module, hidden: list[Tensor], *, capacity: int = 99, kind: Any = Hessian) -> LayerWalk:
    matrices = [name for name, p in layer.named_parameters() if p.ndim >= 2]
    schedule, _ = survey_layer(layer, lambda m: m(hidden[0]), matrices)
    return LayerWalk(layer, list(hidden), lambda m, h, _b: m(h), schedule, kind=kind, capacity=capacity)


def halve(group: Group) -> None:
    """Stands for pruning: a change that later linears must see."""
    for weight in group.weights:
        weight.mul_(0.5)


def names(groups: list[Group]) -> list[list[str]]:
    return [[str(key) for key in group.keys] for group in groups]


def run(walk: LayerWalk) -> list[Group]:
    groups = []
    for group in walk:
        groups.append(group)
        halve(group)
    return groups


def test_linears_with_one_input_come_together_and_in_the_order_of_execution() -> None:
    layer = Wrapped(
        lambda m, x: m.last(m.gate(x) * m.up(x)), last=linear(8, 8), up=linear(8, 8, 1), gate=linear(8, 8, 2)
    )
    groups = run(walk_over(layer, batches()))
    assert names(groups) == [["gate.weight", "up.weight"], ["last.weight"]]
    assert [group.tokens for group in groups] == [35, 35]


def test_statistics_are_taken_once_and_behind_pruned_linears() -> None:
    layer = Wrapped(lambda m, x: m.second(m.first(x).relu()), first=linear(8, 12), second=linear(12, 8))
    dense, hidden = copy.deepcopy(layer), batches()
    groups = run(walk_over(layer, hidden))
    behind = torch.cat([(0.5 * dense.first(h)).relu().flatten(0, 1) for h in hidden]).double()
    # the statistic was handed out with the group; the walk forgot it
    matrix = next(g for g in groups if str(g.keys[0]) == "second.weight").statistic
    assert isinstance(matrix, Hessian)
    torch.testing.assert_close(matrix.matrix.double(), behind.T @ behind / len(behind), rtol=1e-5, atol=1e-7)


def test_outputs_are_those_of_the_finished_layer() -> None:
    layer, hidden = Wrapped(lambda m, x: x + m.b(m.a(x).relu()), a=linear(8, 16), b=linear(16, 8)), batches()
    walk = walk_over(layer, hidden)
    run(walk)
    for before, after in zip(hidden, walk.outputs, strict=True):
        assert torch.equal(layer(before), after)


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_dropped_batches_change_nothing(capacity: int) -> None:
    body: Any = lambda m, x: x + m.down(m.gate(m.o(x)).relu() * m.up(x))  # noqa: E731
    parts = {"o": (8, 8), "gate": (8, 16), "up": (8, 16), "down": (16, 8)}
    layers = [Wrapped(body, **{name: linear(*shape) for name, shape in parts.items()}) for _ in range(2)]
    walks = [walk_over(layers[0], batches()), walk_over(layers[1], batches(), capacity=capacity)]
    groups = [run(walk) for walk in walks]
    assert names(groups[0]) == names(groups[1])
    for whole, dropped in zip(*groups, strict=True):
        assert whole.tokens == dropped.tokens
        assert torch.equal(whole.statistic.matrix, dropped.statistic.matrix)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(walks[0].outputs, walks[1].outputs, strict=True))


def test_a_batch_may_skip_a_linear() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.last(m.rare(x) if x.sum() > 0 else x)  # type: ignore[no-any-return]

    layer, hidden = Wrapped(body, rare=linear(8, 8), last=linear(8, 8)), batches(8)
    hidden.sort(key=lambda h: -float(h.sum()))  # the first meets it, so that the survey does
    taking = sum(float(h.sum()) > 0 for h in hidden)
    assert 0 < taking < 8
    groups = run(walk_over(layer, hidden))
    assert [(str(g.keys[0]), g.tokens) for g in groups] == [("rare.weight", 7 * taking), ("last.weight", 56)]


def test_a_linear_met_twice_is_pruned_last_on_all_its_inputs() -> None:
    layer = Wrapped(lambda m, x: m.twice(m.other(m.twice(x)).tanh()), twice=linear(8, 8), other=linear(8, 8, 1))
    dense, hidden = copy.deepcopy(layer), batches()
    walk = walk_over(layer, hidden)
    groups = run(walk)
    assert names(groups) == [["other.weight"], ["twice.weight"]]
    assert "several times" in groups[1].notes[0]
    first = torch.cat([h.flatten(0, 1) for h in hidden])
    second = torch.cat([(0.5 * dense.other(dense.twice(h))).tanh().flatten(0, 1) for h in hidden])
    inputs = torch.cat([first, second]).double()
    assert isinstance(groups[1].statistic, Hessian)
    torch.testing.assert_close(
        groups[1].statistic.matrix.double(), inputs.T @ inputs / len(inputs), rtol=1e-5, atol=1e-7
    )
    assert all(torch.equal(layer(h), out) for h, out in zip(hidden, walk.outputs, strict=True))


@pytest.mark.parametrize("capacity", [1, 99])
def test_a_linear_met_twice_is_counted_once_by_dropped_batches(capacity: int) -> None:
    layer = Wrapped(lambda m, x: m.b(m.a(m.twice(m.twice(x)))), twice=linear(8, 8), a=linear(8, 8, 1), b=linear(8, 8))
    groups = run(walk_over(layer, batches(), capacity=capacity))
    assert {str(g.keys[0]): g.tokens for g in groups} == {"a.weight": 35, "b.weight": 35, "twice.weight": 70}


def test_an_exception_in_the_middle_ends_every_coroutine() -> None:
    calls = []

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        calls.append(1)
        if len(calls) == 4:  # one for the survey; two batches are past the first linear
            raise RuntimeError("out of luck")
        return m.second(y)  # type: ignore[no-any-return]

    layer, hidden = Wrapped(body, first=linear(8, 8), second=linear(8, 8)), batches()
    walk = walk_over(layer, hidden)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(walk)
    assert_nothing_left(walk)


def test_ctrl_c_in_the_solver_ends_every_coroutine() -> None:
    layer = Wrapped(lambda m, x: m.second(m.first(x)), first=linear(8, 8), second=linear(8, 8))
    walk = walk_over(layer, batches())
    groups = iter(walk)
    next(groups)
    with pytest.raises(KeyboardInterrupt):
        groups.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert_nothing_left(walk)


def assert_nothing_left(walk: LayerWalk) -> None:
    assert not walk._live
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode() is None
    assert not [o for o in gc.get_objects() if type(o).__name__ == "greenlet" and not o.dead and o.parent is not None]


def test_nothing_of_a_finished_walk_stays_in_memory() -> None:
    layer = Wrapped(lambda m, x: m.second(m.first(x)), first=linear(8, 8), second=linear(8, 8))
    walk = walk_over(layer, batches())
    groups = run(walk)
    held = weakref.ref(groups[0].statistic)
    del groups
    assert held() is None


def test_nan_in_an_input_stops_and_names_the_weight() -> None:
    layer = Wrapped(lambda m, x: m.second(m.first(x) / 0), first=linear(8, 8), second=linear(8, 8))
    with pytest.raises(NumericError, match=r"second\.weight"):
        run(walk_over(layer, batches(), kind=FeatureNorm))


def test_nan_in_an_output_stops_even_without_statistics() -> None:
    layer = Wrapped(lambda m, x: m.first(x) / 0, first=linear(8, 8))
    with pytest.raises(NumericError, match="output"):
        run(walk_over(layer, batches(), kind=None))


def test_a_batch_that_goes_back_to_a_finished_linear_is_an_error() -> None:
    """The survey saw a → b; this batch does b → a: then a was pruned without its input."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) if x.sum() > 0 else m.a(m.b(x))  # type: ignore[no-any-return]

    layer = Wrapped(body, a=linear(8, 8), b=linear(8, 8))
    hidden = sorted(batches(8), key=lambda h: -float(h.sum()))
    with pytest.raises(WalkError, match="already"):
        run(walk_over(layer, hidden))


def test_a_linear_that_departs_from_its_group_is_an_error() -> None:
    """The survey saw k share q's input; with another input it may not pass unseen."""

    def body(m: Any, x: Tensor) -> Tensor:
        q = m.q(x)
        return q + m.k(x if x.sum() > 0 else x + 1)  # type: ignore[no-any-return]

    layer = Wrapped(body, q=linear(8, 8), k=linear(8, 8))
    hidden = sorted(batches(8), key=lambda h: -float(h.sum()))
    with pytest.raises(WalkError, match="another input"):
        run(walk_over(layer, hidden))


def test_a_pause_with_gradients_on_is_refused() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m.a(x)  # type: ignore[no-any-return]

    with pytest.raises(WalkError, match="gradients"):
        run(walk_over(Wrapped(body, a=linear(8, 8)), batches()))


class Counting(Watcher):
    def __init__(self) -> None:
        self.notes: dict[str, tuple[str, ...]] = {}
        self.tokens: dict[str, int] = {}

    def pruned(self, weight: Any) -> None:
        self.notes[weight.name] = weight.notes
        self.tokens[weight.name] = weight.tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_pruned_each_on_its_own_tokens(family: str) -> None:
    model, watcher = builders.tiny_model(family), Counting()
    ids = windows(12, 32)
    prune_layers(model, ids, PruneConfig(method="sparsegpt"), device=CPU, watcher=watcher)
    routed = {name: count for name, count in watcher.tokens.items() if "experts.down_proj" in name}
    layers, active = 2, model.config.num_experts_per_tok
    assert len(routed) == 4 * layers
    assert sum(routed.values()) == layers * active * ids.numel()


def test_cold_experts_are_pruned_with_their_stacks_pool() -> None:
    """Few tokens: some experts meet fewer than 2 · in_features, and the report says so."""
    model, watcher = builders.tiny_model("mixtral"), Counting()
    before = model.model.layers[0].mlp.experts.down_proj.data.clone()
    prune_layers(model, windows(2, 12), PruneConfig(method="sparsegpt"), device=CPU, watcher=watcher)
    cold = [name for name, notes in watcher.notes.items() if any("cold" in note for note in notes)]
    assert len(cold) == 16  # 24 tokens, 2 of 4 experts each: at most 24 < 2 · 32 for any expert, two stacks, two layers
    after = model.model.layers[0].mlp.experts.down_proj.data
    assert not torch.equal(before, after)
    assert ((after == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_an_expert_without_a_single_token_is_pruned_too() -> None:
    model, watcher = builders.tiny_model("mixtral"), Counting()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] *= 100
    prune_layers(model, windows(4, 8), PruneConfig(method="wanda"), device=CPU, watcher=watcher)
    for layer in model.model.layers:
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert ((stack == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
