"""Tuning parts of a layer: masks hold, held-out errors fall or stay, and only the part's weights change."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.errors import WalkError
from llmprune.pipeline import loop, prune_layers
from llmprune.results import TunedPart
from llmprune.walk.lockstep import Group
from llmprune.walk.tuning import Part, distance, parts_of, tune
from tests.builders import FAMILIES, tiny_model
from tests.walk.listed_experts import model_with_listed_experts
from tests.walk.test_dense_path import CPU, IDS, spread


def settings(**more: Any) -> PruneConfig:
    return PruneConfig(**{"method": "wanda", "tune": 3, **more})


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_a_tuned_model_has_its_pattern_and_smaller_errors(family: str, sparsity: str) -> None:
    model, plain = spread(tiny_model(family)), spread(tiny_model(family))
    result = prune_layers(model, IDS, settings(sparsity=sparsity), device=CPU)
    before = prune_layers(plain, IDS, settings(sparsity=sparsity, tune=0), device=CPU)
    assert len(result.tuned) == 4  # attention and MLP of two layers
    assert all(part.after <= part.before for part in result.tuned)
    assert any(part.after < 0.99 * part.before for part in result.tuned)
    assert not before.tuned
    for row in result.weights:
        weight = model.get_parameter(row.parameter).data
        weight = weight if row.expert is None else weight[row.expert]
        rows = weight if row.input_axis == 1 else weight.T
        assert int((rows == 0).sum()) == row.zeros
        if sparsity == "2:4":
            assert ((rows.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        else:
            assert row.zeros >= rows.numel() // 2
    untouched = {name for name, _ in model.named_parameters()} - {row.parameter for row in result.weights}
    dense = spread(tiny_model(family))
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in untouched)


def test_the_whole_model_is_nearer_to_the_dense_one() -> None:
    dense, tuned, plain = (spread(tiny_model("llama")) for _ in range(3))
    prune_layers(tuned, IDS, settings(tune=10), device=CPU)
    prune_layers(plain, IDS, settings(tune=0), device=CPU)
    with torch.no_grad():
        truth, better, worse = (m.model(IDS).last_hidden_state for m in (dense, tuned, plain))
    assert (better - truth).square().mean() < 0.9 * (worse - truth).square().mean()


def test_what_follows_is_calibrated_on_the_tuned_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP of the first layer sees the tuned attention: its own masks differ from those without tuning."""
    tuned, plain = spread(tiny_model("llama")), spread(tiny_model("llama"))
    prune_layers(tuned, IDS, settings(tune=10), device=CPU)
    monkeypatch.setattr("llmprune.pipeline.tuner.tune", lambda part, *_, **__: TunedPart(part, 1, 1, 0))
    prune_layers(plain, IDS, settings(tune=10), device=CPU)
    one, two = (m.model.layers[0] for m in (tuned, plain))
    assert torch.equal(one.self_attn.o_proj.weight == 0, two.self_attn.o_proj.weight == 0)
    assert not torch.equal(one.mlp.down_proj.weight == 0, two.mlp.down_proj.weight == 0)


def test_what_decides_is_not_solved_on() -> None:
    """Other tokens in the held-out window change no mask of the first layer: they only say when to stop."""
    other = IDS.clone()
    other[-1] = other[-1].flip(0)
    one, two = spread(tiny_model("llama")), spread(tiny_model("llama"))
    for model, ids in ((one, IDS), (two, other)):
        prune_layers(model, ids, PruneConfig(method="sparsegpt", tune=1), device=CPU)
    first, second = (model.model.layers[0].self_attn.q_proj.weight == 0 for model in (one, two))
    assert torch.equal(first, second)


def test_bfloat16_weights_are_tuned_in_float32_and_stored_as_they_were() -> None:
    model = spread(tiny_model("llama", dtype=torch.bfloat16))
    result = prune_layers(model, IDS, settings(), device=CPU)
    assert any(part.after < part.before for part in result.tuned)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_parts_are_children_of_the_layer_or_the_layer() -> None:
    names = ["attn.q.weight", "attn.o.weight", "mlp.experts.up", "mlp.experts.down"]
    layer = nn.ModuleDict({"attn": nn.Module(), "mlp": nn.Module(), "fc1": nn.Linear(2, 2)})
    assert parts_of(layer, names) == {"attn": names[:2], "mlp": names[2:]}
    assert parts_of(layer, ["attn.q.weight", "fc1.weight"]) == {"": ["attn.q.weight", "fc1.weight"]}


class Half(nn.Module):
    """A layer with one part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.inner(hidden)


def problem() -> tuple[Half, Half, list[Tensor], dict[str, Tensor]]:
    """A dense layer, its pruned copy, inputs and masks."""
    dense = Half()
    pruned = copy.deepcopy(dense)
    masks = {}
    for name in ("inner.0.weight", "inner.2.weight"):
        weight = pruned.get_parameter(name)
        masks[name] = weight.abs() >= weight.abs().median()
        weight.data.mul_(masks[name])
    generator = torch.Generator().manual_seed(1)
    return dense, pruned, [torch.randn(1, 20, 8, generator=generator) for _ in range(8)], masks


def one_expert_a_token() -> Any:
    """A mixture whose windows often miss an expert."""
    config: Any = FAMILIES["qwen3_moe"]()
    config.num_experts_per_tok = 1
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def run_tune(passes: int, learning_rate: float, held_out: frozenset[int] = frozenset({7})) -> Any:
    dense, pruned, hidden, masks = problem()
    targets = Part(dense, "inner", lambda m, h, _b: m(h)).outputs(hidden)
    calls = Part(pruned, "inner", lambda m, h, _b: m(h)).inputs(hidden)
    part = tune(
        "inner",
        [(pruned.get_parameter(name), mask) for name, mask in masks.items()],
        [partial(distance, call, target) for call, target in zip(calls, targets, strict=True)],
        held_out=held_out,
        passes=passes,
        dtypes=[torch.float32, torch.float32],
        learning_rate=learning_rate,
    )
    return part, pruned, masks


def test_a_part_is_called_with_what_the_layer_calls_it_with() -> None:
    dense, _, hidden, _ = problem()
    part = Part(dense, "inner", lambda m, h, _b: m(h))
    for call, output, states in zip(part.inputs(hidden), part.outputs(hidden), hidden, strict=True):
        assert torch.equal(call(), dense.inner(states))
        assert torch.equal(output, dense.inner(states))
    assert not dense.inner._forward_hooks
    assert not dense.inner._forward_pre_hooks


def test_good_steps_lower_the_error_and_keep_the_masks() -> None:
    part, pruned, masks = run_tune(20, 1e-2)
    assert part.after < 0.5 * part.before
    assert all((pruned.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())


def test_steps_that_only_do_harm_are_taken_back() -> None:
    """A learning rate of 10 ruins the part: it ends exactly where it began."""
    part, pruned, _ = run_tune(5, 10.0)
    _, before, _, _ = problem()
    assert part.after == part.before
    assert part.passes == 5
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("slope", [1e-8, 1.0, 100.0])
def test_no_gradient_is_too_small_or_too_large_for_float16(slope: float) -> None:
    """1e-8 is 0 in float16, and 100 times the scale is infinity, until the scale has been halved five times."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    losses = [lambda: slope * weight.float().sum()] * 2
    more: Any = {"held_out": frozenset({1}), "passes": 8, "dtypes": [torch.float16], "learning_rate": 1e-2}
    part = tune("inner", [(weight, None)], losses, **more)
    assert part.after < part.before
    assert weight.isfinite().all()


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out() -> None:
    weight, factors = nn.Parameter(torch.ones(2, 2)), [1.0, 1.0, math.inf, math.nan]
    losses = [lambda: weight.sum() * factors.pop(), lambda: weight.sum()]
    more: Any = {"held_out": frozenset({1}), "passes": 4, "dtypes": [torch.float32]}
    part = tune("inner", [(weight, None)], losses, **more)
    assert part.after < part.before
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("measured", "kept"),
    [
        ((1.0, 2.0, 0.5, 0.7), 2),
        ((1.0, math.nan, 0.5, 0.6), 2),
        ((1.0, 0.75, math.nan, 2.0), 1),
        ((1.0, 1.0, 1.0, 1.0), 0),
    ],
)
def test_the_best_pass_is_kept_whatever_came_before_it(measured: tuple[float, ...], kept: int) -> None:
    """Told what the held-out batch measures before and after each of three passes."""
    weight, said, seen = nn.Parameter(torch.ones(2, 2)), list(measured), []

    def held() -> Tensor:
        seen.append(weight.detach().clone())
        return torch.tensor(said.pop(0))

    part = tune(
        "inner",
        [(weight, None)],
        [lambda: weight.sum(), held],
        held_out=frozenset({1}),
        passes=3,
        dtypes=[torch.float32],
    )
    assert torch.equal(weight, seen[kept])
    assert len({tuple(value.flatten().tolist()) for value in seen}) == 4  # every pass moves it
    assert (part.before, part.after, part.passes) == (measured[0], measured[kept], 3)


def test_other_parameters_get_no_gradient_and_flags_stay() -> None:
    _, pruned, _ = run_tune(2, 1e-2)
    before = problem()[1]
    assert torch.equal(pruned.get_parameter("inner.0.bias"), before.get_parameter("inner.0.bias"))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pruned.parameters())


class Pair(nn.Module):
    """A layer whose attention and MLP are pairs in lists, as LongCat-Flash has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlps = nn.ModuleList(Half() for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlps[1](self.mlps[0](hidden))  # type: ignore[no-any-return]


def test_a_layer_with_a_list_of_modules_is_one_part_called_once_a_batch() -> None:
    layer, hidden = Pair(), [torch.randn(1, 5, 8) for _ in range(3)]
    names = [name for name, _ in layer.named_parameters()]
    parts = parts_of(layer, names)
    assert parts == {"": names}
    part = Part(layer, "", lambda m, h, _b: m(h))
    assert len(part.inputs(hidden)) == len(part.outputs(hidden)) == 3


def test_a_part_that_is_not_called_is_an_error() -> None:
    part = Part(Pair(), "mlps", lambda m, h, _b: m(h))
    for ask in (part.inputs, part.outputs):
        with pytest.raises(WalkError, match="--tune 0"):
            ask([torch.randn(1, 5, 8)])


def test_without_a_held_out_batch_nothing_decides_so_nothing_is_tuned() -> None:
    part, pruned, _ = run_tune(5, 1e-2, held_out=frozenset())
    _, before, _, _ = problem()
    assert part.passes == 0
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), before.parameters(), strict=True))


def test_what_is_measured_is_what_is_stored() -> None:
    """Computed in float32, stored in bfloat16: the held-out batch sees rounded weights only."""
    weight, seen = nn.Parameter(torch.randn(4, 4).bfloat16().float()), []

    def held() -> Tensor:
        seen.append(weight.detach().clone())
        return weight.square().sum()

    losses = [lambda: weight.square().sum(), held]
    more: Any = {"held_out": frozenset({1}), "passes": 3, "dtypes": [torch.bfloat16], "learning_rate": 1e-2}
    part = tune("inner", [(weight, None)], losses, **more)
    assert all(torch.equal(value, value.bfloat16().float()) for value in seen)
    assert part.after == weight.square().sum().item() < part.before


@pytest.mark.parametrize("make", [one_expert_a_token, model_with_listed_experts])
def test_the_next_layer_gets_what_the_tuned_layer_gives(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for windows that were through the layer before the last expert, which they do not meet, was pruned."""
    entered: dict[int, list[Tensor]] = {}
    real = loop._Loop._walk_through

    def watched(self: Any, layer: nn.Module, index: int, *args: Any, **more: Any) -> Any:
        entered[index] = [states.clone() for states in self.pruned.hidden]
        done = real(self, layer, index, *args, **more)
        with torch.no_grad():
            again = [loop.caller(self.pruned, index)(layer, *pair[::-1]) for pair in enumerate(entered[index])]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(self.pruned.hidden, again, strict=True))
        return done

    monkeypatch.setattr(loop._Loop, "_walk_through", watched)
    ids = torch.arange(3, 11)[:, None].repeat(1, 8)  # one and the same token: to few experts
    ids[0] = torch.arange(3, 11)
    result = prune_layers(make(), ids, PruneConfig(method="magnitude", tune=1), device=CPU)
    assert any(part.after < part.before for part in result.tuned)
    assert len(entered) == 2


@pytest.mark.parametrize("tune", [0, 1])
@pytest.mark.parametrize("make", [partial(tiny_model, "qwen3_moe"), model_with_listed_experts])
def test_experts_learn_from_windows_that_nothing_is_decided_on(
    tune: int, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every expert, the statistic it is solved with has as many tokens as it met in the other windows."""
    learned: list[tuple[float, int]] = []
    real = loop.prune_group

    def noted(group: Group, *args: Any, **more: Any) -> Any:
        if "experts" in str(group.keys[0]) and not group.notes and group.statistic is not None:
            learned.append((group.statistic.tokens, group.tokens))
        yield from real(group, *args, **more)

    monkeypatch.setattr(loop, "prune_group", noted)
    ids = torch.randint(3, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    prune_layers(make(), ids, PruneConfig(method="wanda", tune=tune), device=CPU)
    assert learned
    assert all(tokens <= met for tokens, met in learned)
    shares = [tokens / met for tokens, met in learned]
    assert (sum(shares) / len(shares) < 0.95) if tune else set(shares) == {1.0}
