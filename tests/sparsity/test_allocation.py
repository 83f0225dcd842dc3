"""Where the sparsity goes: exact totals, bounds, and optima against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.errors import UserError
from llmprune.sparsity.allocation import (
    Allocation,
    Level,
    bounds,
    cheapest,
    interpolated,
    outlier_share,
    owl_sparsities,
    parse_level,
    shortest_fraction,
    whole_zeros,
)
from llmprune.sparsity.pattern import NM, Unstructured

SIZES = st.lists(st.integers(50, 3000), min_size=1, max_size=8)


def mean(sparsities: list[float], sizes: list[int]) -> float:
    return sum(s * size for s, size in zip(sparsities, sizes, strict=True)) / sum(sizes)


# Outliers -------------------------------------------------------------------------------------------------------------


def test_outliers_are_counted_against_the_mean_of_the_whole_layer() -> None:
    small, large = torch.ones(4, 10), torch.ones(2, 10)
    large[0, 0] = large[1, 3] = 1000.0  # mean about 34: two entries are beyond five times that
    small[0, 0] = 20.0  # beyond five times the mean of its own matrix (1.5), not beyond that of the layer
    assert outlier_share([small, large]) == 2 / 60
    assert outlier_share([small]) == 1 / 40
    assert outlier_share([torch.zeros(3, 3)]) == 0


def test_layers_with_more_outliers_keep_more() -> None:
    sparsities = owl_sparsities([0.01, 0.05, 0.03], [100, 100, 100], 0.7)
    assert sparsities[0] > sparsities[2] > sparsities[1]
    assert sparsities[0] - sparsities[1] == pytest.approx(0.16)  # twice λ
    assert mean(sparsities, [100, 100, 100]) == pytest.approx(0.7)
    assert sparsities[2] == pytest.approx(0.7)


def test_equal_layers_get_equal_sparsity() -> None:
    assert owl_sparsities([0.02, 0.02], [10, 30], 0.6) == pytest.approx([0.6, 0.6])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=12), st.floats(0.02, 0.98))
def test_owl_keeps_the_mean_and_the_bounds(layers: list[tuple[float, int]], sparsity: float) -> None:
    shares, sizes = [share for share, _ in layers], [size for _, size in layers]
    sparsities = owl_sparsities(shares, sizes, sparsity)
    least, most = bounds(sparsity)
    assert mean(sparsities, sizes) == pytest.approx(sparsity, abs=1e-9)
    assert all(least - 1e-12 <= s <= most + 1e-12 for s in sparsities)


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.5, 0.7, 0.9, 0.99])
def test_bounds_leave_no_linear_dense_or_empty(sparsity: float) -> None:
    least, most = bounds(sparsity)
    assert 0 < least < sparsity < most < 1
    assert sparsity - least <= 0.15 + 1e-12
    assert most - sparsity <= 0.15 + 1e-12


# Levels ---------------------------------------------------------------------------------------------------------------


def best_by_trying(menus: list[list[Level]], zeros: int) -> float:
    choices = itertools.product(*menus)
    return min(sum(level.error for level in c) for c in choices if sum(level.zeros for level in c) >= zeros)


MENU = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=4, unique_by=lambda pair: pair[0])


@settings(max_examples=200)
@given(st.lists(MENU, min_size=1, max_size=5), st.floats(0, 1))
def test_whole_levels_meet_the_budget_and_nothing_can_be_taken_back(
    raw: list[list[tuple[int, float]]], share: float
) -> None:
    menus = [[Level(zeros, error) for zeros, error in menu] for menu in raw]
    zeros = round(share * sum(max(level.zeros for level in menu) for menu in menus))
    chosen = cheapest(menus, zeros, divisible=False)
    over = sum(chosen) - zeros
    assert over >= 0
    for menu, count in zip(menus, chosen, strict=True):
        (now,) = [level for level in menu if level.zeros == count]
        assert not [level for level in menu if level.error < now.error and count - level.zeros <= over]
    error = sum(next(x.error for x in menu if x.zeros == n) for menu, n in zip(menus, chosen, strict=True))
    # The greedy choice is optimal but for its last piece.
    steps = max((abs(a.error - b.error) for menu in menus for a in menu for b in menu), default=0.0)
    assert error <= best_by_trying(menus, zeros) + steps + 1e-9


def test_the_budget_goes_where_it_costs_least() -> None:
    menus = [[Level(0, 0.0), Level(10, cost)] for cost in (5.0, 1.0, 3.0, 2.0)]
    assert cheapest(menus, 20, divisible=False) == [0, 10, 0, 10]
    assert cheapest(menus, 21, divisible=False) == [0, 10, 10, 10]
    assert cheapest(menus, 25, divisible=True) == [0, 10, 5, 10]


def test_a_level_that_lies_above_its_neighbours_is_chosen_only_to_fill_up() -> None:
    menu = [Level(0, 0.0), Level(4, 9.0), Level(8, 10.0)]  # 4:8 costs nearly as much as all
    other = [Level(0, 0.0), Level(8, 12.0)]
    assert cheapest([menu, other], 8, divisible=False) == [8, 0]
    assert cheapest([menu, other], 4, divisible=False) == [4, 0]


@given(SIZES, st.floats(0.2, 0.9), st.randoms(use_true_random=False))
def test_a_curve_is_cut_anywhere_and_the_total_is_exact(sizes: list[int], sparsity: float, random: object) -> None:
    least, most = bounds(sparsity)
    points = [least, sparsity, most]
    menus = [interpolated(points, sorted(random.random() for _ in points), size) for size in sizes]  # type: ignore[attr-defined]
    zeros = sum(round(sparsity * size) for size in sizes)
    chosen = cheapest(menus, zeros, divisible=True)
    assert sum(chosen) == zeros
    for size, count in zip(sizes, chosen, strict=True):
        assert round(least * size) <= count <= round(most * size)


def test_equal_curves_get_equal_sparsity_and_steeper_ones_less() -> None:
    points = [0.55, 0.7, 0.85]
    same = [interpolated(points, [1.0, 2.0, 4.0], 1000) for _ in range(3)]
    # Equal slopes are spent one after the other, so the counts differ by no more than one piece of the curve.
    counts = cheapest(same, 2100, divisible=True)
    assert max(counts) - min(counts) <= 20
    steep = interpolated(points, [10.0, 20.0, 40.0], 1000)
    counts = cheapest([same[0], steep], 1400, divisible=True)
    assert counts == [850, 550]


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_points_that_are_no_number_are_no_part_of_a_curve(error: float) -> None:
    assert interpolated([0.4, 0.5, 0.6], [1.0, 2.0, error], 1000) == interpolated([0.4, 0.5], [1.0, 2.0], 1000)
    assert interpolated([0.4, 0.5], [error, 2.0], 1000) == [Level(500, pytest.approx(2.0))]
    assert interpolated([0.4, 0.5], [error, error], 1000) == []


def test_between_two_points_the_error_grows_exponentially() -> None:
    levels = interpolated([0.5, 0.7], [1.0, 100.0], 1000, points=3)
    assert [level.zeros for level in levels] == [500, 600, 700]
    assert [level.error for level in levels] == pytest.approx([1.0, 10.0, 100.0])
    assert interpolated([0.5, 0.6, 0.7], [0.0, 1.0, 2.0], 10)[0].error == pytest.approx(0, abs=1e-20)


# Whole weights --------------------------------------------------------------------------------------------------------


@given(SIZES, st.floats(0.1, 0.9))
def test_whole_zeros_add_up_exactly_and_stay_within_the_limits(sizes: list[int], sparsity: float) -> None:
    limits = bounds(sparsity)
    total = sum(round(sparsity * size) for size in sizes)
    counts = whole_zeros([limits[0], *[sparsity] * (len(sizes) - 1)], sizes, total, limits=limits)
    assert sum(counts) == total
    for count, size in zip(counts, sizes, strict=True):
        assert limits[0] - 1 / size <= count / size <= limits[1] + 1 / size


def test_the_last_linear_takes_the_remainder() -> None:
    assert whole_zeros([0.5, 0.5, 0.5], [101, 101, 101], 151) == [50, 50, 51]
    assert whole_zeros([0.5, 0.5, 0.5], [10, 10, 10], 18, limits=(0.3, 0.6)) == [6, 6, 6]


def test_rows_are_whole_where_zeros_are_counted_by_row() -> None:
    counts = whole_zeros([0.5, 0.7, 0.6], [400, 400, 2000], 1701, units=[20, 40, 100])
    assert [count % unit for count, unit in zip(counts, [20, 40, 100], strict=True)] == [0, 0, 0]
    assert abs(sum(counts) - 1701) <= 10


@given(st.integers(2, 100_000_000), st.floats(0.01, 0.99))
def test_the_shortest_fraction_gives_the_count_back(count: int, share: float) -> None:
    zeros = min(max(1, round(share * count)), count - 1)
    fraction = shortest_fraction(zeros, count)
    assert Unstructured(fraction).zeros_of(count) == zeros
    assert len(repr(fraction)) <= len(repr(zeros / count))


def test_round_numbers_stay_round() -> None:
    assert shortest_fraction(700, 1000) == 0.7
    assert shortest_fraction(7, 9) == 0.8


# Settings -------------------------------------------------------------------------------------------------------------


def test_levels_are_read_as_patterns_or_dense() -> None:
    assert parse_level("dense") is None
    assert parse_level("6:8") == NM(6, 8)
    assert parse_level("50%") == Unstructured(0.5)


def test_a_menu_is_sorted_from_dense_to_sparse() -> None:
    allocation = Allocation(NM(2, 4), "error", 0.4, (NM(6, 8), None))
    assert allocation.menu == (None, NM(6, 8), NM(2, 4))
    assert allocation.total == 0.4
    assert Allocation(Unstructured(0.7), "error").total == 0.7


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((Unstructured(0.7), "evenly"), "one of uniform, owl, error; got 'evenly'"),
        ((NM(2, 4), "owl"), "2:4 is the same everywhere"),
        ((NM(2, 4), "uniform", 0.4), "a budget goes with allocation 'error'"),
        ((Unstructured(0.7), "error", 0.4), "the sparsity itself is the budget"),
        ((NM(2, 4), "error"), r"\(dense, 2:4: 0 to 0.5\), both excluded; got 0.5"),
        ((NM(2, 4), "error", 0.6), "got 0.6"),
        ((NM(2, 4), "error", 0.4, (Unstructured(0.5),)), "levels are N:M"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: tuple[object, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Allocation(*arguments)  # type: ignore[arg-type]
