"""Refits against float64 normal equations, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.methods import Magnitude, SparseGPT, Wanda
from llmprune.sparsity.least_squares import LeastSquares, refit
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from tests.methods.problems import hessian_of, inputs_like_a_models, norms_of, output_error, random_weight

PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 7), Unstructured(0.5), Unstructured(0.9)]


def exact(target: Tensor, mask: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Each row's own linear system on its kept columns, in float64."""
    full = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    solved = torch.zeros_like(target, dtype=torch.float64)
    for row, keep in enumerate(mask):
        wanted = full[keep] @ target[row].double()
        solved[row, keep] = torch.linalg.solve(full[keep][:, keep], wanted)
    return solved


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_many_steps_reach_the_exact_solution(pattern: Pattern) -> None:
    weight, inputs = random_weight(12, 56), inputs_like_a_models(400, 56)
    start = Wanda().prune(weight, norms_of(inputs), pattern)
    hessian = hessian_of(inputs).matrix
    truth = exact(weight, start.mask, hessian, 0.01)
    found = refit(start.weight, start.mask, hessian, target=weight, dampening_frac=0.01, steps=200)
    assert (found.double() - truth).abs().max() < 2e-4 * truth.abs().max()
    assert (found[~start.mask] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_twenty_steps_are_nearly_exact(pattern: Pattern) -> None:
    weight, inputs = random_weight(32, 56), inputs_like_a_models(400, 56)
    start = Wanda().prune(weight, norms_of(inputs), pattern)
    some, all_ = (
        refit(start.weight, start.mask, hessian_of(inputs).matrix, target=weight, steps=steps) for steps in (20, 200)
    )
    assert output_error(inputs, weight, some) < 1.01 * output_error(inputs, weight, all_)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_step_is_a_gain_in_the_damped_error(steps: int) -> None:
    weight, inputs = random_weight(32, 56), inputs_like_a_models(400, 56)
    start = Magnitude().prune(weight, None, NM(2, 4))
    hessian = hessian_of(inputs).matrix
    found = refit(start.weight, start.mask, hessian.clone(), target=weight, steps=steps)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())

    def damped_error(pruned: Tensor) -> Tensor:
        missing = (pruned - weight).double()
        return ((missing @ hessian.double()) * missing).sum(1)

    assert (damped_error(found) < damped_error(start.weight)).all()  # of each row, not only of their sum


def test_wanda_with_a_refit_beats_sparsegpts_sweep() -> None:
    weight, inputs = random_weight(64, 56), inputs_like_a_models(600, 56)
    start = Wanda().prune(weight, norms_of(inputs), NM(2, 4))
    found = refit(start.weight, start.mask, hessian_of(inputs).matrix, target=weight)
    sweep = SparseGPT().prune(weight, hessian_of(inputs), NM(2, 4))
    assert output_error(inputs, weight, found) < output_error(inputs, weight, sweep.weight)


def test_another_target_is_met_instead() -> None:
    weight, other, inputs = random_weight(12, 56), random_weight(12, 56, seed=5), inputs_like_a_models(400, 56)
    start = Wanda().prune(weight, norms_of(inputs), NM(2, 4))
    found = refit(start.weight, start.mask, hessian_of(inputs).matrix, target=other, steps=200)
    truth = exact(other, start.mask, hessian_of(inputs).matrix, 0.01)
    assert (found.double() - truth).abs().max() < 1e-3 * truth.abs().max()


@pytest.mark.parametrize("dead", [slice(0, 3), slice(None)])
def test_dead_inputs_leave_the_target(dead: slice) -> None:
    """What meets only zeros does not matter: its kept weights become the target's, and nothing becomes NaN."""
    weight, inputs = random_weight(12, 56), inputs_like_a_models(400, 56)
    inputs[:, dead] = 0
    start = Magnitude().prune(weight, None, NM(2, 4))
    found = refit(start.weight, start.mask, hessian_of(inputs).matrix, target=weight)
    assert torch.isfinite(found).all()
    kept = start.mask[:, dead]
    assert torch.allclose(found[:, dead][kept], weight[:, dead][kept], rtol=1e-4)


@pytest.mark.parametrize(("steps", "helps"), [(1, False), (2, True), (3, True), (5, True)])
def test_a_step_beyond_helps_without_a_product(steps: int, helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = random_weight(48, 96), inputs_like_a_models(800, 96)
    problem = LeastSquares.of(weight, hessian_of(inputs).matrix, 0.01)
    keep = Wanda().prune(weight, norms_of(inputs), NM(2, 4)).mask.T.contiguous()

    def error(steps: int, *, beyond: bool) -> float:
        missed = problem.solve_on(keep, problem.target * keep, steps, beyond=beyond) - problem.target
        return (missed * (problem.matrix @ missed)).sum().item()

    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **more: products.append(1) or multiply(*given, **more))
    plain, further = error(steps, beyond=False), error(steps, beyond=True)
    assert len(products) == 2 * steps
    assert further < plain if helps else further == plain
    if helps:
        assert plain - further > 0.5 * (plain - error(steps + 1, beyond=False))  # of what a whole step would bring


def test_where_rounding_has_left_no_minimum_the_start_stays() -> None:
    """Such matrices come of taking large means away from inputs that depend on each other closely."""
    weight, mask = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[True, True, False]])
    broken = torch.tensor([[1.0, 1.04, 0.5], [1.04, 1.0, 0.5], [0.5, 0.5, 1.0]])
    found = refit(weight * mask, mask, broken, target=weight * torch.tensor([[1.0, 1.2, 1.0]]), steps=5)
    assert torch.isfinite(found).all()
    assert found.abs().max() < 10


def test_solving_again_changes_nothing() -> None:
    weight, inputs = random_weight(12, 56), inputs_like_a_models(400, 56)
    start = Wanda().prune(weight, norms_of(inputs), NM(2, 4))
    once = refit(start.weight, start.mask, hessian_of(inputs).matrix, target=weight, steps=300)
    twice = refit(once, start.mask, hessian_of(inputs).matrix, target=weight, steps=300)
    assert (once - twice).abs().max() < 1e-4 * once.abs().max()


def test_scaled_and_back_is_the_same() -> None:
    weight, inputs = random_weight(12, 56), inputs_like_a_models(400, 56)
    problem = LeastSquares.of(weight, hessian_of(inputs).matrix, 0.01)
    assert torch.allclose(problem.matrix.diagonal(), torch.ones(56))
    assert torch.allclose(problem.from_scaled(problem.to_scaled(weight)), weight, rtol=1e-6)
