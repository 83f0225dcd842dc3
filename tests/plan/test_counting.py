"""Work counted on a small instance says what the large one takes."""

from __future__ import annotations

import pytest
import torch

from llmprune.config import PruneConfig
from llmprune.plan.counting import Counter, Work, extrapolated
from llmprune.plan.workload import Case, count_case, counted
from llmprune.sparsity.pattern import NM


def test_products_traffic_and_memory_are_counted() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    with Counter() as counter:
        product = left @ right
        product.add_(1)
        del product
        torch.ones(2, 2)
    assert counter.work == Work(products=2 * 3 * 5 * 7, moved=2 * 4 * 21 + 16, calls=3, peak=4 * 21)


def test_what_is_let_go_makes_room() -> None:
    """Of 100 numbers that were there before, half are let go before 80 others come: the most is 30 more than before."""
    first, second = torch.ones(50), torch.ones(50)
    counter = Counter([first, second, first[:10]])  # a view is no memory of its own
    with counter:
        torch.ones(20)
        del first
        torch.ones(80)
    assert counter.work.peak == 4 * 30


def test_products_in_place_and_factorings_are_counted() -> None:
    matrix = torch.eye(6)
    with Counter() as counter:
        torch.zeros(6, 6).addmm_(matrix, matrix)
        torch.linalg.cholesky_ex(matrix)
        torch.linalg.solve_triangular(matrix, torch.ones(6, 2), upper=True)
    assert counter.work.products == 2 * 6**3
    assert counter.work.factorings == pytest.approx(6**3 / 3 + 6 * 6 * 2)


def case_of(settings: dict[str, str], *, biased: bool = False) -> Case:
    config = PruneConfig(**settings)  # type: ignore[arg-type]
    recipe = config.recipe
    return Case(
        recipe=recipe,
        pattern=config.pattern,
        rows=(192, 192),
        in_features=384,
        kind=recipe.statistic,
        held_out=recipe.dense_targets,
        biased=biased,
        tokens=96,
        computed=torch.bfloat16,
        stored=torch.bfloat16,
    )


@pytest.mark.parametrize("settings", [{"method": "wanda"}, {"method": "sparsegpt"}, {"effort": "balanced"}])
@pytest.mark.parametrize("biased", [False, True])
def test_a_solve_is_extrapolated(settings: dict[str, str], biased: bool) -> None:
    case = case_of(settings, biased=biased)
    truth, found = count_case(case), extrapolated(lambda size: count_case(case.shrunk(size)), 128, 384)
    for quantity in ("products", "factorings", "moved", "peak"):
        assert getattr(found, quantity) == pytest.approx(getattr(truth, quantity), rel=0.1), quantity
    assert found.calls == pytest.approx(truth.calls, rel=0.05)


def test_a_refit_of_biases_holds_no_second_copy_of_a_statistic() -> None:
    plain, biased = (count_case(case_of({"effort": "balanced"}, biased=one)) for one in (False, True))
    assert biased.moved > plain.moved
    assert biased.peak == pytest.approx(plain.peak, rel=0.02)


def test_groups_may_be_wider_than_what_is_counted() -> None:
    recipe = PruneConfig(sparsity="256:512", method="wanda").recipe
    case = Case(
        recipe=recipe,
        pattern=NM(256, 512),
        rows=(64,),
        in_features=1024,
        kind=recipe.statistic,
        held_out=False,
        biased=False,
        tokens=64,
        computed=torch.float32,
        stored=torch.float32,
    )
    assert counted(case).peak > 4 * 64 * 1024
