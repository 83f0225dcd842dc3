"""Group-wise descent against every choice there is, tried one by one in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmprune.methods import Magnitude, SparseGPT
from llmprune.recipe import Recipe
from llmprune.sparsity.group_descent import polish
from llmprune.sparsity.pattern import NM
from tests.methods.problems import hessian_of, inputs_like_a_models, output_error, random_weight

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(1, 7)]
WIDTH = 56


def damped(inputs: Tensor, fraction: float = 0.01) -> Tensor:
    matrix = inputs.double().T @ inputs.double() / len(inputs)
    return matrix + fraction * matrix.diagonal().mean() * torch.eye(len(matrix))


def error_of(weight: Tensor, target: Tensor, matrix: Tensor) -> Tensor:
    """Of every row, in float64."""
    missing = weight.double() - target.double()
    return ((missing @ matrix) * missing).sum(1)


def best_with_one_group_changed(weight: Tensor, target: Tensor, matrix: Tensor, pattern: NM) -> Tensor:
    """The smallest error of each row that another choice in one group, with its best values, would give."""
    best = error_of(weight, target, matrix)
    for start in range(0, weight.shape[1], pattern.m):
        for chosen in combinations(range(start, start + pattern.m), pattern.n):
            places = list(chosen)
            other = weight.double().clone()
            other[:, start : start + pattern.m] = 0
            pull = ((target.double() - other) @ matrix)[:, places]
            other[:, places] = torch.linalg.solve(matrix[places][:, places], pull.T).T
            best = torch.minimum(best, error_of(other, target, matrix))
    return best


def polished(pattern: NM, sweeps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, inputs = random_weight(12, WIDTH), inputs_like_a_models(400, WIDTH)
    hessian = hessian_of(inputs)
    first = Magnitude().prune(weight, None, pattern)
    found, mask = polish(first.weight, first.mask, hessian.matrix, target=weight, pattern=pattern, sweeps=sweeps)
    return weight, first.weight, found, mask, damped(inputs)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_pattern_holds(pattern: NM) -> None:
    _, _, found, mask, _ = polished(pattern, 1)
    assert (mask.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all()
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_no_row_gets_worse_and_most_get_better(pattern: NM, sweeps: int) -> None:
    weight, first, found, _, matrix = polished(pattern, sweeps)
    before, after = error_of(first, weight, matrix), error_of(found, weight, matrix)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)], ids=str)
def test_in_the_end_no_group_can_be_chosen_better(pattern: NM) -> None:
    weight, _, found, _, matrix = polished(pattern, 40)
    reached = error_of(found, weight, matrix)
    assert (best_with_one_group_changed(found, weight, matrix, pattern) > reached * (1 - 1e-3)).all()
    one_sweep = error_of(polished(pattern, 1)[2], weight, matrix)
    assert (best_with_one_group_changed(polished(pattern, 1)[2], weight, matrix, pattern) < one_sweep * 0.999).any()


def test_groups_that_do_not_know_each_other_are_solved_exactly_by_one_sweep() -> None:
    blocks = [torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)).double() for seed in range(40)]
    matrix = torch.block_diag(*(block.T @ block for block in blocks))
    weight = random_weight(6, 160)
    first = Magnitude().prune(weight, None, NM(2, 4))
    found, _ = polish(
        first.weight, first.mask, matrix.float(), target=weight, pattern=NM(2, 4), dampening_frac=1e-9, sweeps=1
    )
    pairs = torch.stack([_best_of_group(weight, matrix, start) for start in range(0, 160, 4)], 1)
    torch.testing.assert_close(error_of(found, weight, matrix), pairs.sum(1), rtol=1e-4, atol=1e-6)


def _best_of_group(weight: Tensor, matrix: Tensor, start: int) -> Tensor:
    own, wanted = matrix[start : start + 4, start : start + 4], weight[:, start : start + 4].double()
    errors = []
    for chosen in combinations(range(4), 2):
        places = list(chosen)
        solved = torch.zeros_like(wanted)
        solved[:, places] = torch.linalg.solve(own[places][:, places], (wanted @ own)[:, places].T).T
        errors.append((((solved - wanted) @ own) * (solved - wanted)).sum(1))
    return torch.stack(errors).amin(0)


def test_it_repairs_what_sparsegpt_leaves_as_a_step_of_a_recipe() -> None:
    weight, inputs = random_weight(48, WIDTH), inputs_like_a_models(600, WIDTH)
    plain, repaired = (
        Recipe(SparseGPT(), polish=sweeps).solve(weight, hessian_of(inputs), NM(2, 4), rows=[48]).solution
        for sweeps in (0, 2)
    )
    assert output_error(inputs, weight, repaired.weight) < 0.9 * output_error(inputs, weight, plain.weight)
    assert not torch.equal(plain.mask, repaired.mask)
    assert (repaired.weight[~repaired.mask] == 0).all()
