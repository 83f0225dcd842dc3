"""Masks: exact counts whatever the scores are, and the highest scores kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.sparsity.masks import keep_smallest_out, mask_per_matrix, mask_per_row, nm_mask, row_blocks
from llmprune.sparsity.pattern import NM, Unstructured

# Few values and both infinities: ties everywhere, as in weights with many zeros.
TIED = st.sampled_from([0.0, 0.0, 1.0, 2.0, float("inf"), -float("inf")])
ANY = st.floats(width=32, allow_nan=False)


@st.composite
def matrices(draw: st.DrawFn, multiple: int = 1) -> Tensor:
    """Scores (1 to 5, `multiple` times 1 to 6), all different or mostly equal."""
    rows, columns = draw(st.integers(1, 5)), multiple * draw(st.integers(1, 6))
    values = draw(st.lists(draw(st.sampled_from([TIED, ANY])), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).view(rows, columns)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores whose rows divide into groups of m, with n and m."""
    m = draw(st.integers(2, 9))
    return draw(matrices(multiple=m)), draw(st.integers(1, m - 1)), m


def kept_are_highest(scores: Tensor, mask: Tensor) -> bool:
    """Whether along the last axis no dropped score is above a kept one."""
    lowest_kept = scores.where(mask, torch.inf).amin(-1)
    highest_dropped = scores.where(~mask, -torch.inf).amax(-1)
    return bool((highest_dropped <= lowest_kept).all())


@given(grouped())
@settings(deadline=None)
def test_every_group_keeps_exactly_its_n_highest(case: tuple[Tensor, int, int]) -> None:
    scores, n, m = case
    mask = nm_mask(scores, n, m)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
    assert kept_are_highest(scores.unflatten(-1, (-1, m)), mask.unflatten(-1, (-1, m)))
    assert torch.equal(mask, mask_per_row(scores, NM(n, m)))


@given(matrices(), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_every_row_loses_exactly_its_share(scores: Tensor, sparsity: float) -> None:
    pattern = Unstructured(sparsity)
    mask = mask_per_row(scores, pattern)
    assert ((~mask).sum(-1) == pattern.zeros_of(scores.shape[1])).all()
    assert kept_are_highest(scores, mask)


@given(matrices(), st.floats(0, 1))
@settings(deadline=None)
def test_a_matrix_loses_exactly_its_share(scores: Tensor, fraction: float) -> None:
    zeros = round(fraction * scores.numel())  # none and all of them too
    mask = mask_per_matrix(scores, zeros)
    assert mask.shape == scores.shape
    assert int((~mask).sum()) == zeros
    assert kept_are_highest(scores.flatten(), mask.flatten())


@pytest.mark.parametrize("columns", [16, 96, 1000, 4096])  # topk changes its algorithm with the size
@pytest.mark.parametrize("value", [0.0, 1.0, float("inf"), float("nan")])
def test_counts_are_exact_when_all_scores_are_equal(columns: int, value: float) -> None:
    scores = torch.full((3, columns), value)
    assert ((~mask_per_row(scores, Unstructured(0.375))).sum(-1) == 0.375 * columns).all()
    assert (nm_mask(scores, 2, 4).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert int((~mask_per_matrix(scores, columns + 1)).sum()) == columns + 1


def test_equal_scores_are_decided_alike_each_time() -> None:
    scores = torch.randint(0, 3, (8, 512), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(mask_per_row(scores, Unstructured(0.5)), mask_per_row(scores.clone(), Unstructured(0.5)))


def test_a_view_gives_the_mask_of_its_copy() -> None:
    """SparseGPT hands over transposed and sliced scores."""
    scores = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    view = scores.T[:, 3:9]
    assert torch.equal(mask_per_matrix(view, 31), mask_per_matrix(view.contiguous(), 31))
    assert torch.equal(nm_mask(scores.T, 2, 4), nm_mask(scores.T.contiguous(), 2, 4))


def test_small_examples_by_hand() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 9.0, 8.0, 7.0]])
    assert nm_mask(scores, 1, 2).tolist() == [[True, False, True, False], [False, True, True, False]]
    assert mask_per_row(scores, Unstructured(0.25)).tolist() == [[True, False, True, True], [False, True, True, True]]
    assert mask_per_matrix(scores, 3).tolist() == [[True, False, True, False], [False, True, True, True]]
    assert keep_smallest_out(scores[0], 1).tolist() == [True, False, True, True]


def test_rows_that_do_not_divide_are_an_error_not_a_shorter_group() -> None:
    with pytest.raises(RuntimeError):
        nm_mask(torch.ones(2, 6), 2, 4)


def test_the_rows_of_each_stacked_linear() -> None:
    weight = torch.zeros(7, 4)
    assert row_blocks(weight, None) == [slice(0, 7)]
    assert row_blocks(weight, [4, 1, 2]) == [slice(0, 4), slice(4, 5), slice(5, 7)]
    with pytest.raises(AssertionError):
        row_blocks(weight, [4, 4])
