"""What holds for every method in the table, whatever it scores by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.methods import METHODS, Alps, Method, Solution
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from tests.methods.problems import inputs_like_a_models, output_error, random_weight, statistic_for

PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 7), Unstructured(0.5), Unstructured(0.37)]
WIDTH = 56
each_method = pytest.mark.parametrize("method", [kind() for kind in METHODS.values()], ids=list(METHODS))
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def solve(
    method: Method, weight: Tensor, pattern: Pattern, *, inputs: Tensor | None = None, rows: list[int] | None = None
) -> Solution:
    """Prune with the statistic of `inputs`."""
    inputs = inputs_like_a_models(200, weight.shape[1]) if inputs is None else inputs
    return method.prune(weight, statistic_for(method, inputs), pattern, rows)


def assert_valid(solution: Solution, weight: Tensor, method: Method, pattern: Pattern) -> None:
    """The pattern's exact count in its scope, zeros where dropped, all else finite."""
    dropped = ~solution.mask
    if isinstance(pattern, NM):
        assert (dropped.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.m - pattern.n).all()
    elif method.scope == "row":
        assert (dropped.sum(1) == pattern.zeros_of(weight.shape[1])).all()
    else:
        assert int(dropped.sum()) == pattern.zeros_of(weight.numel())
    assert solution.weight.shape == solution.mask.shape == weight.shape
    assert solution.weight.dtype == torch.float32
    assert (solution.weight[dropped] == 0).all()
    assert not solution.weight[dropped].signbit().any()  # a zero is written as 0.0, never as −0.0
    assert torch.isfinite(solution.weight).all()


def test_the_table() -> None:
    assert list(METHODS) == ["magnitude", "wanda", "sparsegpt", "alps"]
    for kind in METHODS.values():
        assert kind.scope in ("row", "matrix")
        assert kind() == kind()  # frozen settings with defaults


@each_method
@each_pattern
def test_the_pattern_is_met_exactly(method: Method, pattern: Pattern) -> None:
    weight = random_weight(9, WIDTH)
    solution = solve(method, weight, pattern)
    assert_valid(solution, weight, method, pattern)
    assert (solution.weight[solution.mask] != 0).all()


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_shape_and_any_pattern(data: st.DataObject) -> None:
    """Also weights with equal values and zeros, inputs with dead and repeated columns, fewer tokens than features."""
    m = data.draw(st.integers(2, 9), "m")
    patterns = st.one_of(
        st.builds(NM, st.integers(1, m - 1), st.just(m)), st.builds(Unstructured, st.floats(0.01, 0.99))
    )
    pattern, columns = data.draw(patterns, "pattern"), m * data.draw(st.integers(1, 5), "groups")
    weight = random_weight(data.draw(st.integers(1, 6), "rows"), columns, seed=data.draw(st.integers(0, 99), "seed"))
    if data.draw(st.booleans(), "equal values and zeros"):
        weight = weight.round()
    inputs = inputs_like_a_models(data.draw(st.integers(1, 60), "tokens"), columns)
    inputs[:, data.draw(st.lists(st.integers(0, columns - 1)), "dead columns")] = 0
    inputs[:, data.draw(st.lists(st.integers(0, columns - 1)), "repeated columns")] = inputs[:, :1].clone()
    settings: dict[str, Any] = {"block_size": data.draw(st.integers(1, 50), "block size")}
    for name, kind in METHODS.items():
        method = kind(**settings) if name == "sparsegpt" else kind()
        assert_valid(solve(method, weight, pattern, inputs=inputs), weight, method, pattern)


@each_method
@each_pattern
def test_pruning_twice_changes_nothing(method: Method, pattern: Pattern) -> None:
    once = solve(method, random_weight(9, WIDTH), pattern).weight
    assert torch.equal(solve(method, once, pattern).weight, once)


@each_method
@each_pattern
def test_pruning_twice_changes_nothing_where_scores_are_equal(method: Method, pattern: Pattern) -> None:
    """Dead columns give Wanda more scores of zero than it may drop: it must choose the same ones again."""
    inputs = inputs_like_a_models(200, WIDTH)
    inputs[:, ::3] = inputs[:, 1::3] = 0
    once = solve(method, random_weight(9, WIDTH).round(), pattern, inputs=inputs).weight
    assert torch.equal(solve(method, once, pattern, inputs=inputs).weight, once)


@each_method
@each_pattern
def test_the_method_is_a_pure_function(method: Method, pattern: Pattern) -> None:
    weight, statistic = random_weight(9, WIDTH), statistic_for(method, inputs_like_a_models(200, WIDTH))
    before = weight.clone()
    first = method.prune(weight, statistic, pattern)
    assert torch.equal(weight, before)
    second = method.prune(weight, statistic, pattern)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.mask, second.mask)


@each_method
@each_pattern
def test_stacked_linears_are_solved_as_if_alone(method: Method, pattern: Pattern) -> None:
    """A linear of large weights beside small ones: counted over the stack, it would lose nearly nothing."""
    rows = [4, 1, 10]
    parts = [random_weight(count, WIDTH, seed=count) * 10.0**i for i, count in enumerate(rows)]
    stacked = solve(method, torch.cat(parts), pattern, rows=rows)
    for part, weight, mask in zip(parts, stacked.weight.split(rows), stacked.mask.split(rows), strict=True):
        alone = solve(method, part, pattern)
        if isinstance(method, Alps):  # its penalty rises with the changes in the whole stack
            assert int((~mask).sum()) == int((~alone.mask).sum())
            assert (mask == alone.mask).float().mean() > 0.8
        else:
            assert torch.equal(mask, alone.mask)
            assert torch.allclose(weight, alone.weight, rtol=1e-5, atol=1e-6 * float(part.abs().max()))


@each_method
@each_pattern
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_survive_rounding(method: Method, pattern: Pattern, dtype: torch.dtype) -> None:
    solution = solve(method, random_weight(9, WIDTH), pattern)
    assert torch.equal(solution.weight.to(dtype) == 0, ~solution.mask)


@each_method
@each_pattern
def test_minus_zero_is_a_zero(method: Method, pattern: Pattern) -> None:
    weight = random_weight(9, WIDTH)
    zero = random_weight(9, WIDTH, seed=1) > 0.8
    plus, minus = weight.masked_fill(zero, 0.0), weight.masked_fill(zero, -0.0)
    assert_valid(solve(method, minus, pattern), minus, method, pattern)
    assert torch.equal(solve(method, minus, pattern).weight, solve(method, plus, pattern).weight)


@each_method
@each_pattern
def test_zeros_enough_leave_nothing_to_do(method: Method, pattern: Pattern) -> None:
    """Four of five weights are zero already, more than any pattern here wants: the others stay, bit for bit."""
    weight = torch.zeros(9, WIDTH)
    kept = torch.arange(WIDTH) % 8 == 3  # one in every group of 4, 7 or 8 at most
    weight[:, kept] = random_weight(9, int(kept.sum()))
    solution = solve(method, weight, pattern)
    assert_valid(solution, weight, method, pattern)
    assert torch.equal(solution.weight, weight)


@each_pattern
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_better_the_method_the_smaller_the_error(pattern: Pattern, seed: int) -> None:
    weight, inputs = random_weight(32, WIDTH, seed), inputs_like_a_models(400, WIDTH, seed)
    errors = [
        output_error(inputs, weight, solve(kind(), weight, pattern, inputs=inputs).weight) for kind in METHODS.values()
    ]
    magnitude, wanda, sparsegpt, alps = errors
    assert alps < 0.9 * sparsegpt
    assert sparsegpt < 0.8 * wanda
    assert wanda < 0.9 * magnitude
