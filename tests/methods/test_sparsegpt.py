"""SparseGPT against the paper's algorithm in its plainest form, and where the Hessian gives trouble."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericError, UserError
from llmprune.methods import Magnitude, SparseGPT
from llmprune.methods.sparsegpt import inverse_factor
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import Hessian
from tests.methods.problems import CPU, hessian_of, inputs_like_a_models, output_error, random_weight

WIDTH = 56  # a multiple of 4, 7 and 8, and not of the strip of 16


def identity_hessian(in_features: int) -> Hessian:
    return hessian_of(torch.eye(in_features) * in_features**0.5)


def reference(
    weight: Tensor, inputs: Tensor, pattern: Pattern, *, block_size: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The paper's sweep in float64, from the optimal-brain-surgeon formulas: (weight, mask).

    Column by column, with a fresh dense inverse of what remains of the Hessian: no Cholesky factor, no strips, no lazy
    updates. A weight costs w² / [H⁻¹]₀₀ and its removal changes all to its right by w / [H⁻¹]₀₀ · [H⁻¹]₀.
    """
    weight, hessian = weight.double().clone(), inputs.double().T @ inputs.double() / len(inputs)
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    variances = torch.stack([inverse[0, 0] for inverse in inverses])
    step = pattern.m if isinstance(pattern, NM) else block_size
    mask = torch.ones_like(weight, dtype=torch.bool)
    for j, inverse in enumerate(inverses):
        if j % step == 0:
            costs = weight[:, j : j + step] ** 2 / variances[j : j + step]
            mask[:, j : j + step] = choose(costs, pattern, j, weight.shape[1])
        removed = weight[:, j].where(~mask[:, j], 0)
        weight[:, j:] -= torch.outer(removed / inverse[0, 0], inverse[0])
        weight[:, j] = weight[:, j].where(mask[:, j], 0)
    return weight, mask


def choose(costs: Tensor, pattern: Pattern, start: int, in_features: int) -> Tensor:
    """Which weights of a group, or of a block of all rows, stay: by sorting, with thresholds."""
    if isinstance(pattern, NM):
        return costs >= costs.sort(1, descending=True).values[:, [pattern.n - 1]]
    total = round(pattern.sparsity * len(costs) * in_features)
    end = start + costs.shape[1]
    zeros = total * end // in_features - total * start // in_features
    return costs > (costs.flatten().sort().values[zeros - 1] if zeros else -1)


def assert_same(solution_weight: Tensor, mask: Tensor, expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Equal masks, and weights as near as float32 allows relative to the largest."""
    assert torch.equal(mask, expected[1])
    worst = (solution_weight.double() - expected[0]).abs().max() / expected[0].abs().max()
    assert worst < tolerance, f"{worst:.1e}"


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 7), NM(5, 28)], ids=str)
@pytest.mark.parametrize("block_size", [1, 10, 16, 30, 56, 128])
def test_the_papers_algorithm_for_groups(pattern: Pattern, block_size: int) -> None:
    """The size of a block is a matter of speed here."""
    weight, inputs = random_weight(12, WIDTH), inputs_like_a_models(400, WIDTH)
    solution = SparseGPT(block_size=block_size).prune(weight, hessian_of(inputs), pattern)
    assert_same(solution.weight, solution.mask, reference(weight, inputs, pattern), 1e-5)
    assert solution.notes == ()


@pytest.mark.parametrize("sparsity", [0.5, 0.37, 0.9, 0.01])
@pytest.mark.parametrize("block_size", [1, 7, 16, 30, 56, 128])
def test_the_papers_algorithm_for_unstructured_zeros(sparsity: float, block_size: int) -> None:
    """The size of a block decides which columns compete."""
    weight, inputs = random_weight(12, WIDTH), inputs_like_a_models(400, WIDTH)
    solution = SparseGPT(block_size=block_size).prune(weight, hessian_of(inputs), Unstructured(sparsity))
    expected = reference(weight, inputs, Unstructured(sparsity), block_size=block_size)
    assert_same(solution.weight, solution.mask, expected, 1e-5)


@pytest.mark.parametrize("damping", [0.0001, 0.2])
def test_damping_is_a_fraction_of_the_mean_diagonal(damping: float) -> None:
    weight, inputs = random_weight(12, WIDTH), 30 * inputs_like_a_models(400, WIDTH)
    solution = SparseGPT(dampening_frac=damping).prune(weight, hessian_of(inputs), NM(2, 4))
    assert_same(solution.weight, solution.mask, reference(weight, inputs, NM(2, 4), damping=damping), 1e-4)


def test_uncorrelated_inputs_of_one_size_make_it_magnitude() -> None:
    weight = random_weight(9, WIDTH)
    for pattern in (NM(2, 4), NM(3, 7)):
        solution = SparseGPT().prune(weight, identity_hessian(WIDTH), pattern)
        magnitude = Magnitude().prune(weight, None, pattern)
        assert torch.equal(solution.mask, magnitude.mask)
        assert torch.equal(solution.weight, magnitude.weight)  # and nothing to repair


def test_the_size_of_the_inputs_does_not_matter() -> None:
    weight, inputs = random_weight(9, WIDTH), inputs_like_a_models(100, WIDTH)
    expected = SparseGPT().prune(weight, hessian_of(inputs), NM(2, 4))
    for factor in (2.0**-40, 2.0**40):
        solution = SparseGPT().prune(weight, hessian_of(inputs * factor), NM(2, 4))
        assert torch.equal(solution.mask, expected.mask)
        assert torch.allclose(solution.weight, expected.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("out_features", "in_features", "block_size"), [(3, 10, 4), (5, 33, 16), (7, 130, 48)])
@pytest.mark.parametrize("sparsity", [0.5, 0.37, 0.05, 0.97])
def test_zeros_of_a_matrix_are_exact_where_blocks_do_not_divide(
    out_features: int, in_features: int, block_size: int, sparsity: float
) -> None:
    weight, inputs = random_weight(out_features, in_features), inputs_like_a_models(200, in_features)
    solution = SparseGPT(block_size=block_size).prune(weight, hessian_of(inputs), Unstructured(sparsity))
    assert int((~solution.mask).sum()) == round(sparsity * weight.numel())
    for start in range(0, in_features, block_size):  # and spread evenly: no block is off by more than one
        dropped = ~solution.mask[:, start : start + block_size]
        assert abs(int(dropped.sum()) - sparsity * dropped.numel()) < 1.5


def test_the_factor_is_the_inverse_of_the_damped_hessian() -> None:
    hessian = hessian_of(inputs_like_a_models(300, 40)).matrix
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(40)
    factor, notes = inverse_factor(hessian, 0.05)
    assert notes == ()
    assert torch.equal(factor, factor.triu())
    product = factor.double().T @ factor.double() @ damped
    assert (product - torch.eye(40)).abs().max() < 1e-4


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_columns_that_saw_only_zeros_neither_cause_nor_take_repairs(pattern: Pattern) -> None:
    """What they weigh is the damping alone, as in the formulas."""
    inputs = inputs_like_a_models(200, WIDTH)
    inputs[:, ::4] = 0
    weight = random_weight(9, WIDTH)
    solution = SparseGPT().prune(weight, hessian_of(inputs), pattern)
    assert_same(solution.weight, solution.mask, reference(weight, inputs, pattern), 1e-5)
    assert torch.equal(solution.weight[:, ::4], weight[:, ::4].where(solution.mask[:, ::4], 0))


def test_small_weights_that_saw_only_zeros_go_first_and_nothing_else_changes() -> None:
    inputs = inputs_like_a_models(200, WIDTH)
    inputs[:, ::4] = 0
    weight = random_weight(9, WIDTH)
    weight[:, ::4] *= 1e-4
    solution = SparseGPT().prune(weight, hessian_of(inputs), NM(3, 4))
    weight[:, ::4] = 0
    assert torch.equal(solution.weight, weight)


def test_no_input_at_all_is_magnitude_with_a_note() -> None:
    weight = random_weight(9, WIDTH)
    solution = SparseGPT().prune(weight, Hessian(WIDTH, CPU), NM(2, 4))
    assert torch.equal(solution.weight, Magnitude().prune(weight, None, NM(2, 4)).weight)
    assert solution.notes == ("all inputs are zero: pruned by magnitude",)


def test_repeated_columns_are_no_trouble_with_the_usual_damping() -> None:
    inputs = inputs_like_a_models(300, WIDTH // 2).repeat(1, 2)
    weight = random_weight(9, WIDTH)
    solution = SparseGPT().prune(weight, hessian_of(inputs), NM(2, 4))
    assert_same(solution.weight, solution.mask, reference(weight, inputs, NM(2, 4)), 1e-3)
    assert solution.notes == ()


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_too_little_damping_is_raised_and_noted(pattern: Pattern) -> None:
    inputs = inputs_like_a_models(300, 1).repeat(1, WIDTH) * torch.linspace(1, 3, WIDTH)  # rank one
    weight = random_weight(9, WIDTH)
    solution = SparseGPT(dampening_frac=1e-9).prune(weight, hessian_of(inputs), pattern)
    assert solution.notes == ("damping raised from 1e-09 to 0.01",)
    usual = SparseGPT(dampening_frac=0.01).prune(weight, hessian_of(inputs), pattern)
    assert torch.equal(solution.mask, usual.mask)
    assert torch.allclose(solution.weight, usual.weight, rtol=1e-3, atol=1e-4)
    assert output_error(inputs, weight, solution.weight) < 0.01


def bent_hessian(smallest: float) -> Hessian:
    """Mean diagonal 1, and one eigenvalue `smallest`, which may be negative as no sum of squares has it."""
    hessian = identity_hessian(8)
    hessian.upper[0, 1] = (1 - smallest) * hessian.tokens
    return hessian


@pytest.mark.parametrize(("smallest", "fraction"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1)])
def test_damping_is_raised_no_further_than_needed(smallest: float, fraction: float) -> None:
    factor, notes = inverse_factor(bent_hessian(smallest).matrix, 0.001)
    assert notes == (f"damping raised from 0.001 to {fraction}",)
    at_once, _ = inverse_factor(bent_hessian(smallest).matrix, fraction)
    assert torch.allclose(factor, at_once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("smallest", [-1.5, float("nan")])
def test_a_hopeless_hessian_is_an_error_and_not_an_identity(smallest: float) -> None:
    with pytest.raises(NumericError, match=r"not positive definite.*--num-samples.*--method wanda"):
        SparseGPT().prune(random_weight(3, 8), bent_hessian(smallest), NM(2, 4))


@pytest.mark.parametrize("block_size", [0, -1, 1.5, "128", None])
def test_a_block_has_columns(block_size: int) -> None:
    with pytest.raises(UserError, match=f"number of columns, at least 1; got {block_size!r}"):
        SparseGPT(block_size=block_size)


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.0, float("nan"), "1e-2"])
def test_damping_is_a_fraction(damping: float) -> None:
    with pytest.raises(UserError, match=f"between 0 and 1, usually 0.01; got {damping!r}"):
        SparseGPT(dampening_frac=damping)
