"""ALPS against the splitting in its plainest form, and what its mask is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.errors import UserError
from llmprune.methods import Alps, SparseGPT
from llmprune.sparsity.least_squares import refit
from llmprune.sparsity.masks import mask_per_matrix, nm_mask
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from tests.methods.problems import hessian_of, inputs_like_a_models, output_error, random_weight

WIDTH = 56


def reference(weight: Tensor, inputs: Tensor, *, damping: float, steps: int) -> Tensor:
    """The mask of 2:4 in float64, with Y, Z and the dual V apart and a linear solve each step."""
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    scale = hessian.diagonal().sqrt()
    matrix, target = hessian / scale / scale[:, None], weight.double() * scale
    mask = nm_mask(target.abs(), 2, 4)
    before, copy, dual, penalty = mask, target * mask, torch.zeros_like(target), 0.1
    for step in range(1, steps + 1):
        shifted = matrix + penalty * torch.eye(len(matrix))
        exact = torch.linalg.solve(shifted, (target @ matrix - dual + penalty * copy).T).T
        pulled = exact + dual / penalty
        mask = nm_mask(pulled.abs(), 2, 4)
        copy = pulled * mask
        dual = dual + penalty * (exact - copy)
        if step % 3 == 0:
            changed = int((mask != before).sum()) / 2 / int(mask.sum())
            if changed == 0:
                break
            penalty *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            before = mask
    return mask


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_papers_splitting(seed: int, damping: float) -> None:
    weight, inputs = random_weight(24, WIDTH, seed), inputs_like_a_models(400, WIDTH, seed)
    solution = Alps(dampening_frac=damping, first_penalty=0.1, admm_steps=60).prune(
        weight, hessian_of(inputs), NM(2, 4)
    )
    expected = reference(weight, inputs, damping=damping, steps=60)
    assert (solution.mask == expected).float().mean() > 0.995  # float32 decides near ties otherwise


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5), Unstructured(0.7)], ids=str)
def test_its_mask_is_better_than_sparsegpts_and_its_weights_are_the_best_on_it(pattern: Pattern) -> None:
    weight, inputs = random_weight(48, WIDTH), inputs_like_a_models(600, WIDTH)
    alps, other = (
        Alps().prune(weight, hessian_of(inputs), pattern),
        SparseGPT().prune(weight, hessian_of(inputs), pattern),
    )
    solved = refit(other.weight, other.mask, hessian_of(inputs).matrix, target=weight, steps=100)
    assert output_error(inputs, weight, alps.weight) < output_error(inputs, weight, solved)
    exact = refit(alps.weight, alps.mask, hessian_of(inputs).matrix, target=weight, steps=100)
    assert output_error(inputs, weight, alps.weight) < 1.05 * output_error(inputs, weight, exact)


def test_a_large_matrix_whose_threshold_is_sampled() -> None:
    """More entries than are looked at: the count is exact all the same, and the mask as good."""
    weight, inputs = random_weight(1500, WIDTH), inputs_like_a_models(600, WIDTH)
    pattern = Unstructured(0.5)
    solution = Alps().prune(weight, hessian_of(inputs), pattern)
    assert int((~solution.mask).sum()) == pattern.zeros_of(weight.numel())
    small = Alps().prune(weight[:500], hessian_of(inputs), pattern)
    assert output_error(inputs, weight, solution.weight) < 1.05 * output_error(inputs, weight[:500], small.weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_without_a_step_its_mask_is_that_of_the_largest_scaled_entries(pattern: Pattern) -> None:
    weight, inputs = random_weight(24, WIDTH), inputs_like_a_models(400, WIDTH)
    found = Alps(admm_steps=0).prune(weight, hessian_of(inputs), pattern)
    hessian = hessian_of(inputs).matrix
    scores = weight.abs() * (hessian.diagonal() + 0.01 * hessian.diagonal().mean()).sqrt()
    expected = (
        nm_mask(scores, 2, 4) if isinstance(pattern, NM) else mask_per_matrix(scores, pattern.zeros_of(weight.numel()))
    )
    assert torch.equal(found.mask, expected)
    assert output_error(inputs, weight, found.weight) < 0.9 * output_error(inputs, weight, weight.where(expected, 0))


def test_a_pattern_that_leaves_nothing_leaves_nothing() -> None:
    """7 of 8 entries of a 2 × 2 matrix are, rounded, all of them."""
    solution = Alps().prune(random_weight(2, 2), hessian_of(inputs_like_a_models(9, 2)), Unstructured(0.875))
    assert not solution.mask.any()
    assert not solution.weight.any()


@pytest.mark.parametrize(("name", "least"), [("admm_steps", 0), ("refit_steps", 1)])
def test_steps_are_counted(name: str, least: int) -> None:
    with pytest.raises(UserError, match=f"{name} is a number of steps, at least {least}; got {least - 1}"):
        Alps(**{name: least - 1})


def test_a_penalty_is_positive() -> None:
    with pytest.raises(UserError, match="first_penalty is a positive number"):
        Alps(first_penalty=0)
