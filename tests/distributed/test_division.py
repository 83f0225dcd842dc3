"""A stack that several processes solve in parts comes out as if one had solved it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.distributed import Team
from llmprune.methods import METHODS
from llmprune.pipeline.division import solve_divided
from llmprune.recipe import Recipe, Solved
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import PairedHessian, Statistic
from tests.distributed.threads import in_threads

INPUTS, ROWS = 64, (48, 16, 16)
RECIPES = {
    **{name: Recipe(method()) for name, method in METHODS.items()},
    "repaired": Recipe(METHODS["wanda"](), polish=3, refit=5),
    "dense targets": Recipe(METHODS["alps"](), dense_targets=True),
}


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) / 8
    return torch.randn(400, INPUTS, generator=generator) @ mix


def statistic(recipe: Recipe, seed: int) -> Statistic | None:
    if recipe.statistic is None:
        return None
    found, met = recipe.statistic(INPUTS, torch.device("cpu")), inputs(seed)
    found.update(met)
    found.compare(met, met + 0.2 * inputs(seed).roll(1, dims=1))
    return found


def solve(recipe: Recipe, pattern: Pattern, team: Team) -> Solved:
    weight = torch.randn(sum(ROWS), INPUTS, generator=torch.Generator().manual_seed(1))
    held = statistic(recipe, 3) if recipe.statistic is PairedHessian else None
    settings: dict[str, Any] = {"rows": ROWS, "held": held, "centred": False, "team": team}
    return solve_divided(recipe, weight, statistic(recipe, 2), pattern, **settings)


@pytest.mark.parametrize("size", [2, 3, 5])  # of five some have no row to solve
@pytest.mark.parametrize(
    ("name", "pattern"), [*((name, NM(2, 4)) for name in RECIPES), *((name, Unstructured(0.5)) for name in METHODS)]
)
def test_parts_put_together_are_the_whole(name: str, pattern: Pattern, size: int) -> None:
    recipe = RECIPES[name]
    alone = solve(recipe, pattern, Team())
    found = in_threads(size, lambda team: solve(recipe, pattern, team))
    for one in found:
        assert torch.equal(one.solution.weight, found[0].solution.weight)
        assert torch.equal(one.solution.mask, found[0].solution.mask)
    mask, weight = found[0].solution.mask, found[0].solution.weight
    assert (mask == alone.solution.mask).float().mean() >= 0.999
    same = mask == alone.solution.mask
    torch.testing.assert_close(weight.where(same, 0), alone.solution.weight.where(same, 0), atol=1e-3, rtol=1e-3)
    assert found[0].steps == pytest.approx(alone.steps, rel=1e-4) if alone.steps[0] is not None else True
    counts = [part.sum().item() for part in mask.split(ROWS)]
    assert counts == [part.sum().item() for part in alone.solution.mask.split(ROWS)]
