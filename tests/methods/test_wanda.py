"""Wanda: |W| · ‖X‖ against its definition, and against magnitude where inputs are all of one size."""

from __future__ import annotations

import pytest
import torch

from llmprune.methods import Magnitude, Wanda
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import FeatureNorm
from tests.methods.problems import CPU, inputs_like_a_models, norms_of, random_weight

PATTERNS: list[Pattern] = [NM(2, 4), NM(3, 7), Unstructured(0.5), Unstructured(0.37)]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def test_a_small_weight_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, -2.0]])
    inputs = torch.tensor([[6.0, 0.0, 0.0, 2.0], [8.0, 1.0, -1.0, 0.0]])  # norms 10, 1, 1, 2
    solution = Wanda().prune(weight, norms_of(inputs), NM(2, 4))  # scores 10, 4, 3, 4.0
    assert solution.weight[0, 0] == 1
    assert solution.weight[0, 2] == 0
    assert Wanda().prune(weight, norms_of(inputs), Unstructured(0.75)).weight.tolist() == [[1, 0, 0, 0]]


@each_pattern
def test_the_definition_in_float64(pattern: Pattern) -> None:
    weight, inputs = random_weight(9, 56), inputs_like_a_models(80, 56)
    mask = Wanda().prune(weight, norms_of(inputs), pattern).mask
    scores = weight.double().abs() * inputs.double().norm(dim=0)
    groups, kept = scores, 56 - pattern.zeros_of(56)
    if isinstance(pattern, NM):
        groups, kept = scores.unflatten(1, (-1, pattern.m)), pattern.n
    threshold = groups.sort(-1, descending=True).values[..., kept - 1 : kept]
    assert torch.equal(mask, (groups >= threshold).view_as(mask))


@each_pattern
def test_inputs_of_one_size_make_it_magnitude(pattern: Pattern) -> None:
    weight = random_weight(9, 56)
    signs = torch.where(random_weight(30, 56, seed=1) > 0, 1.0, -1.0)
    solution, magnitude = Wanda().prune(weight, norms_of(signs), pattern), Magnitude().prune(weight, None, pattern)
    assert torch.equal(solution.mask, magnitude.mask)
    assert torch.equal(solution.weight, magnitude.weight)


def test_kept_weights_stay_as_they_are() -> None:
    weight = random_weight(9, 56)
    solution = Wanda().prune(weight, norms_of(inputs_like_a_models(80, 56)), Unstructured(0.5))
    assert torch.equal(solution.weight[solution.mask], weight[solution.mask])
    assert (solution.weight[~solution.mask] == 0).all()
    assert ((~solution.mask).sum(1) == 28).all()  # each row alone


def test_weights_that_meet_only_zeros_go_first() -> None:
    inputs = inputs_like_a_models(40, 16)
    inputs[:, [0, 1, 6, 7, 11, 15]] = 0
    weight = random_weight(5, 16)
    weight[:, [0, 1, 6, 7, 11, 15]] *= 1000
    mask = Wanda().prune(weight, norms_of(inputs), Unstructured(0.5)).mask
    assert not mask[:, [0, 1, 6, 7, 11, 15]].any()


@each_pattern
def test_no_input_at_all_makes_it_magnitude(pattern: Pattern) -> None:
    weight = random_weight(9, 56) / 100
    solution = Wanda().prune(weight, FeatureNorm(56, CPU), pattern)
    assert torch.equal(solution.mask, Magnitude().prune(weight, None, pattern).mask)


def test_magnitude_decides_among_weights_that_meet_only_zeros() -> None:
    inputs = inputs_like_a_models(40, 4) * 1e-18  # as small as inputs can be for their squares to be summed
    inputs[:, :3] = 0
    weight = torch.tensor([[0.25, -0.5, 0.125, 0.01]])
    assert Wanda().prune(weight, norms_of(inputs), NM(2, 4)).mask.tolist() == [[False, True, False, True]]


def test_a_statistic_of_another_method_is_refused() -> None:
    with pytest.raises(AssertionError):
        Wanda().prune(random_weight(5, 16), None, NM(2, 4))
