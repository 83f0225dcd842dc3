"""Which pattern each linear gets: overrides, allocations measured on the dense model, and stacks that are split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.config import PruneConfig
from llmprune.errors import NumericError, UserError
from llmprune.methods import Alps, SparseGPT
from llmprune.pipeline import plan as plan_module
from llmprune.pipeline import prune_layers, survey_model
from llmprune.pipeline.groups import Place, prune_group
from llmprune.pipeline.overrides import overridden
from llmprune.pipeline.plan import Plan, make_plan
from llmprune.recipe import Recipe
from llmprune.sparsity.allocation import Allocation, bounds, owl_sparsities
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import PairedHessian
from llmprune.walk.lockstep import Group
from llmprune.walk.products import WeightKey
from llmprune.walk.survey import Schedule
from tests.builders import tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))

# Stacks ---------------------------------------------------------------------------------------------------------------

NAMES = ("a.weight", "b.weight", "c.weight")
RECIPES = {
    "sparsegpt": Recipe(SparseGPT()),
    "paired": Recipe(Alps(), dense_targets=True, refit=3),
    "paired with biases": Recipe(SparseGPT(), dense_targets=True),
}


def group_of(names: tuple[str, ...], *, biases: bool) -> Group:
    """Linears of 16 inputs, the same numbers for the same name each time, with statistics of their own."""
    own = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(rows, 16, generator=own) for name, rows in zip(NAMES, (6, 4, 8), strict=True)}
    bias = {name: torch.randn(len(weight), generator=own) for name, weight in weights.items()}
    sums = [PairedHessian(16, CPU), PairedHessian(16, CPU)]
    first = torch.randn(64, 16, generator=own)
    for part in sums:
        inputs = torch.randn(64, 16, generator=own) @ torch.randn(16, 16, generator=own)
        part.update(inputs)
        part.compare(inputs, inputs + 0.3 * torch.randn(64, 16, generator=own) + 0.1 * inputs)
    keys = tuple(WeightKey(name) for name in names)
    found = {key: (key.parameter.replace("weight", "bias"), bias[key.parameter]) for key in keys} if biases else {}
    return Group(keys, [weights[name] for name in names], sums[0], first, 128, sums[1], found)


def place_of(patterns: dict[str, Pattern]) -> Place:
    schedule = Schedule((), dict.fromkeys(NAMES, 1), (), 0)
    stored = dict.fromkeys([*NAMES, *(name.replace("weight", "bias") for name in NAMES)], torch.float32)
    return Place(0, "", schedule, stored, set(), patterns=patterns)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "patterns", [{"b.weight": NM(1, 4)}, {"a.weight": NM(3, 4), "b.weight": Unstructured(0.3)}, {}], ids=str
)
def test_linears_with_patterns_of_their_own_are_solved_as_if_alone(recipe: str, patterns: dict[str, Pattern]) -> None:
    """Each part of a stack meets statistics that no other part has used up."""
    biases = recipe == "paired with biases"
    group, place = group_of(NAMES, biases=biases), place_of(patterns)
    rows = {row.name: row for row in prune_group(group, RECIPES[recipe], NM(2, 4), place)}
    assert group.statistic is None
    assert group.held is None
    assert {str(key) for key in place.masks} == set(NAMES)
    for name, weight in zip(NAMES, group.weights, strict=True):
        pattern = patterns.get(name, NM(2, 4))
        # Linears of one pattern choose their step towards the dense path together.
        alike = tuple(other for other in NAMES if patterns.get(other, NM(2, 4)) == pattern)
        alone, elsewhere = group_of(alike, biases=biases), place_of({})
        row = next(r for r in prune_group(alone, RECIPES[recipe], pattern, elsewhere) if r.name == name)
        torch.testing.assert_close(weight, alone.weights[alike.index(name)], rtol=0, atol=0)
        assert torch.equal(place.masks[WeightKey(name)], elsewhere.masks[WeightKey(name)])
        assert rows[name].pattern == str(pattern)
        assert (rows[name].step, rows[name].error, rows[name].zeros) == (row.step, row.error, row.zeros)
        if biases:
            found = group.biases[WeightKey(name)][1]
            assert torch.equal(found, alone.biases[WeightKey(name)][1])


# Overrides ------------------------------------------------------------------------------------------------------------

INPUTS = {
    f"model.layers.{index}.{name}.weight": inputs
    for index in (0, 1, 10)
    for name, inputs in (("self_attn.q_proj", 32), ("mlp.up_proj", 32), ("mlp.down_proj", 48))
}


def test_entries_are_read_as_ignore_reads_them() -> None:
    found = overridden(INPUTS, {"re:.*layers.1.*up_proj": "4:8", "down_proj": "50%", "layers.0.": "dense"})
    first = [name for name in INPUTS if ".layers.0." in name]
    assert {name: found[name] for name in first} == dict.fromkeys(first)
    assert found["model.layers.1.mlp.down_proj.weight"] == Unstructured(0.5)
    assert found["model.layers.10.mlp.up_proj.weight"] == NM(4, 8)
    assert "model.layers.1.self_attn.q_proj.weight" not in found
    assert "model.layers.10.self_attn.q_proj.weight" not in found


def test_of_several_entries_the_last_counts() -> None:
    found = overridden(INPUTS, {"down_proj": "dense", "model.layers.1.mlp.down_proj": "2:4"})
    assert found["model.layers.1.mlp.down_proj.weight"] == NM(2, 4)
    assert found["model.layers.0.mlp.down_proj.weight"] is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"k_proj": "2:4"}, "'k_proj' matches no weight that can be pruned"),
        ({"layers.7.": "dense"}, "'layers.7.' matches no weight"),
        ({"down_proj": "5:32"}, "down_proj.weight has 48 inputs, which do not divide into groups of 5:32"),
        ({"down_proj": "two"}, "sparsity is a fraction"),
    ],
)
def test_an_entry_that_cannot_be_met_is_refused(overrides: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        overridden(INPUTS, overrides)


# Plans ----------------------------------------------------------------------------------------------------------------


def plan_of(model: Any, allocation: Allocation, **settings: Any) -> Plan:
    survey = survey_model(model, IDS, PruneConfig(sparsity=str(allocation.pattern)), device=CPU)
    return make_plan(model, IDS, allocation, survey, device=CPU, **settings)


def sizes_and_sparsities(model: Any, plan: Plan) -> list[tuple[int, float]]:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return [
        (layer.get_parameter(name).numel(), pattern.sparsity if pattern is not None else 0.0)
        for layer, patterns in zip(layers, plan.layers, strict=True)
        for name, pattern in patterns.items()
    ]


def zeros_of(model: Any, plan: Plan, index: int, name: str) -> int:
    pattern = plan.layers[index][name]
    assert pattern is not None
    return pattern.zeros_of(model.model.layers[index].get_parameter(name).numel())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["uniform", "owl", "error"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_a_plan_spends_the_sparsity_and_changes_nothing(family: str, kind: str, scope: str) -> None:
    model = tiny_model(family)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    plan = plan_of(model, Allocation(Unstructured(0.6), kind), scope=scope)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    found = sizes_and_sparsities(model, plan)
    least, most = bounds(0.6)
    assert all(least - 0.02 <= sparsity <= most + 0.02 for _, sparsity in found)
    total = sum(size for size, _ in found)
    wanted = sum(round(0.6 * size) for size, _ in found)
    tolerance = len(found) * 4 if scope == "matrix" else 0.02 * total  # tiny rows: a zero more in each is a lot
    assert abs(sum(round(size * sparsity) for size, sparsity in found) - wanted) <= tolerance


@pytest.mark.parametrize("kind", ["owl", "error"])
def test_zeros_are_exactly_as_many_as_a_uniform_sparsity_has(kind: str) -> None:
    model: Any = tiny_model("llama")
    uniform = plan_of(model, Allocation(Unstructured(0.7)))
    plan = plan_of(model, Allocation(Unstructured(0.7), kind))
    names = [(index, name) for index, layer in enumerate(plan.layers) for name in layer]
    assert plan.layers != uniform.layers
    assert sum(zeros_of(model, plan, *at) for at in names) == sum(zeros_of(model, uniform, *at) for at in names)


def test_owl_counts_the_outliers_of_weights_times_input_norms() -> None:
    model: Any = tiny_model("llama")
    plan = plan_of(model, Allocation(Unstructured(0.7), "owl"))
    shares = []
    for layer in model.model.layers:
        scores = []
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            inputs: list[Tensor] = []
            handle = linear.register_forward_pre_hook(lambda _m, args, kept=inputs: kept.append(args[0].flatten(0, 1)))
            with torch.no_grad():
                model(IDS)
            handle.remove()
            scores.append(linear.weight.detach().abs() * inputs[0].square().mean(0).sqrt())
        flat = torch.cat([part.flatten() for part in scores])
        shares.append((flat > 5 * flat.mean()).float().mean().item())
    size = sum(size for size, _ in sizes_and_sparsities(model, plan)) // 2
    wanted = owl_sparsities(shares, [size, size], 0.7)
    assert max(wanted) - min(wanted) == pytest.approx(0.16)
    for layer, sparsity in zip(plan.layers, wanted, strict=True):
        for pattern in layer.values():
            assert pattern is not None
            assert pattern.sparsity == pytest.approx(sparsity, abs=0.005)


def test_what_does_nothing_is_pruned_most() -> None:
    """A linear whose output hardly reaches the residual stream, and a layer that does little, give what others need."""
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-4
    plan = plan_of(model, Allocation(Unstructured(0.6), "error"))
    most = bounds(0.6)[1]
    idle = [plan.layers[1][f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
    assert [pattern.sparsity for pattern in idle if pattern] == pytest.approx([most] * 3, abs=0.005)
    assert min(pattern.sparsity for pattern in plan.layers[0].values() if pattern) < 0.6


@pytest.mark.parametrize("levels", [(None,), (None, NM(6, 8)), (NM(6, 8), NM(1, 4))], ids=str)
def test_a_budget_is_met_by_whole_levels_with_little_to_spare(levels: tuple[Pattern | None, ...]) -> None:
    model = tiny_model("llama")
    plan = plan_of(model, Allocation(NM(2, 4), "error", 0.4, levels))
    found = sizes_and_sparsities(model, plan)
    assert {pattern for layer in plan.layers for pattern in layer.values()} <= {NM(2, 4), *levels}
    spent = sum(size * sparsity for size, sparsity in found) / sum(size for size, _ in found)
    assert 0.4 <= spent <= 0.4 + max(size for size, _ in found) * 0.5 / sum(size for size, _ in found)


def test_levels_that_do_not_divide_are_not_chosen() -> None:
    model = tiny_model("llama")  # 32 and 48 inputs
    plan = plan_of(model, Allocation(NM(2, 4), "error", 0.45, (None, NM(24, 32))))
    assert all(layer["mlp.down_proj.weight"] in (None, NM(2, 4)) for layer in plan.layers)


def test_a_budget_that_the_dividing_levels_cannot_reach_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"a budget of 0.72 cannot be reached: .* make 0.700"):
        plan_of(model, Allocation(NM(2, 4), "error", 0.72, (NM(8, 32),)))


def test_dense_weights_are_left_alone_and_listed_with_the_reason() -> None:
    model: Any = tiny_model("llama")
    survey = survey_model(model, IDS, PruneConfig(), device=CPU)
    plan = make_plan(
        model, IDS, Allocation(NM(2, 4), "error", 0.3), survey, device=CPU, overrides={"layers.0.mlp.": "dense"}
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = prune_layers(model, IDS, PruneConfig(), device=CPU, survey=plan.applied_to(survey))
    reasons = {row.name: row.reason for row in result.skipped if row.reason.startswith("kept dense")}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "kept dense by an override"
    by_allocation = {name for name, reason in reasons.items() if reason == "kept dense by the allocation"}
    assert by_allocation
    assert len(reasons) - len(by_allocation) == 3
    assert not {row.name for row in result.weights} & set(reasons)
    assert len(result.weights) + len(reasons) == 14
    for name in reasons:
        assert torch.equal(model.get_parameter(name), before[name])


def test_overridden_weights_have_no_part_in_the_budget() -> None:
    model: Any = tiny_model("llama")
    plan = plan_of(model, Allocation(Unstructured(0.7), "error"), overrides={"down_proj": "2:4", "q_proj": "0.2"})
    assert all(layer["mlp.down_proj.weight"] == NM(2, 4) for layer in plan.layers)
    assert all(layer["self_attn.q_proj.weight"] == Unstructured(0.2) for layer in plan.layers)
    free = [
        (index, name)
        for index, layer in enumerate(plan.layers)
        for name in layer
        if "down_proj" not in name and "q_proj" not in name
    ]
    sizes = [model.model.layers[index].get_parameter(name).numel() for index, name in free]
    assert sum(zeros_of(model, plan, *at) for at in free) == sum(round(0.7 * size) for size in sizes)


def test_a_uniform_plan_measures_nothing() -> None:
    model = tiny_model("llama")
    survey = survey_model(model, IDS, PruneConfig(), device=CPU)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    plan = make_plan(model, IDS, Allocation(NM(2, 4)), survey, device=CPU)
    assert not calls
    assert {pattern for layer in plan.layers for pattern in layer.values()} == {NM(2, 4)}
    assert plan.applied_to(survey).schedules == survey.schedules


@pytest.mark.parametrize("kind", ["owl", "error"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_windows_are_enough_for_an_allocation(kind: str, count: int) -> None:
    """Two are measured on, and where there are no more, nothing is left to take statistics on besides."""
    model, allocation = tiny_model("llama"), Allocation(Unstructured(0.6), kind)
    survey = survey_model(model, IDS[:count], PruneConfig(sparsity="60%"), device=CPU)
    plan = make_plan(model, IDS[:count], allocation, survey, device=CPU, batch_size=2)
    assert len({pattern for layer in plan.layers for pattern in layer.values()}) > 1


PATTERNS = [Unstructured(0.6), NM(2, 4)]


def broken_on_trial(monkeypatch: pytest.MonkeyPatch, error: float, *, at: set[Pattern | None]) -> None:
    """Layer 1's up_proj overflows when it is pruned to one of these levels."""
    whole = plan_module._error_of

    def sometimes(turn: Any, linear: Any, level: Pattern | None) -> float:
        bad = (linear.layer, linear.name) == (1, "mlp.up_proj.weight") and level in at
        return error if bad else whole(turn, linear, level)

    monkeypatch.setattr(plan_module, "_error_of", sometimes)


@pytest.mark.parametrize("error", [math.nan, math.inf])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_level_that_overflows_on_trial_is_not_chosen(
    pattern: Pattern, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-4  # so that it would be pruned most
    sparsest = Unstructured(bounds(0.6)[1]) if isinstance(pattern, Unstructured) else pattern
    broken_on_trial(monkeypatch, error, at={sparsest})
    budget = 0.4 if isinstance(pattern, NM) else None
    plan = plan_of(model, Allocation(pattern, "error", budget))
    chosen = plan.layers[1]["mlp.up_proj.weight"]
    assert chosen is None if isinstance(pattern, NM) else chosen is not None and chosen.sparsity < 0.61
    others = [level for layer in plan.layers for level in layer.values() if level is not chosen]
    assert len(set(others)) > 1 or pattern in others


@pytest.mark.parametrize("error", [math.nan, math.inf])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_weight_that_overflows_at_every_level_is_named(
    pattern: Pattern, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, most = bounds(0.6)
    broken_on_trial(monkeypatch, error, at={Unstructured(least), Unstructured(0.6), Unstructured(most), NM(2, 4), None})
    budget = 0.4 if isinstance(pattern, NM) else None
    with pytest.raises(NumericError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: .* NaN or inf .*bfloat16"):
        plan_of(tiny_model("llama"), Allocation(pattern, "error", budget))


def test_where_overflows_leave_too_little_to_prune_nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    least, _ = bounds(0.6)
    monkeypatch.setattr(
        plan_module, "_error_of", lambda _turn, _linear, level: 1.0 if level == Unstructured(least) else math.inf
    )
    with pytest.raises(NumericError, match="so many weights give NaN or inf that 60% cannot be reached"):
        plan_of(tiny_model("llama"), Allocation(Unstructured(0.6), "error"))
