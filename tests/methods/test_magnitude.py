"""Magnitude: the smallest weights go, inside each row, and nothing else changes."""

from __future__ import annotations

import torch

from llmprune.methods import Magnitude
from llmprune.sparsity.pattern import NM, Unstructured
from tests.methods.problems import norms_of, random_weight


def test_a_small_weight_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, -2.0], [-0.125, 0.25, 0.5, -0.375]])
    solution = Magnitude().prune(weight, None, Unstructured(0.5))
    assert solution.weight.tolist() == [[0, -4, 3, 0], [0, 0, 0.5, -0.375]]
    assert solution.mask.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert solution.notes == ()


def test_groups_keep_their_n_largest() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, -2.0, 9.0, 8.0, 0.0, 7.0]])
    assert Magnitude().prune(weight, None, NM(1, 4)).weight.tolist() == [[0, -4, 0, 0, 9, 0, 0, 0]]
    assert Magnitude().prune(weight, None, NM(2, 4)).weight.tolist() == [[0, -4, 3, 0, 9, 8, 0, 0]]


def test_the_kept_are_larger_than_the_dropped_in_every_row() -> None:
    weight = random_weight(6, 50)
    weight[3] *= 100  # rows do not compete
    solution = Magnitude().prune(weight, None, Unstructured(0.3))
    kept = weight.abs().where(solution.mask, torch.inf).amin(1)
    dropped = weight.abs().where(~solution.mask, 0).amax(1)
    assert (dropped < kept).all()
    assert ((~solution.mask).sum(1) == 15).all()
    assert torch.equal(solution.weight[solution.mask], weight[solution.mask])


def test_inputs_play_no_part() -> None:
    weight = random_weight(4, 8)
    inputs = norms_of(random_weight(10, 8, seed=1))
    with_inputs = Magnitude().prune(weight, inputs, NM(2, 4), rows=[1, 3])
    assert torch.equal(with_inputs.weight, Magnitude().prune(weight, None, NM(2, 4)).weight)
