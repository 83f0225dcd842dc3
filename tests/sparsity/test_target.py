"""Targets from the dense path: against float64 regression, and the promise that a held-out error never grows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.methods import Alps, Method, SparseGPT, Wanda
from llmprune.recipe import MeanInputs, Recipe
from llmprune.sparsity.pattern import NM
from llmprune.sparsity.statistics import PairedHessian
from llmprune.sparsity.target import SAMPLE, _sample, _shift, shifted_target
from tests.methods.problems import CPU, inputs_like_a_models, random_weight

WIDTH, OUT = 24, 16


def paired(inputs: Tensor, dense: Tensor) -> PairedHessian:
    statistic = PairedHessian(inputs.shape[1], CPU)
    for part, other in zip(inputs.split(50), dense.split(50), strict=True):
        statistic.update(part)
        statistic.compare(part, other)
    return statistic


def changed_inputs(tokens: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Inputs of a pruned model and of the dense one, which differ in a way that can be predicted, and in noise."""
    dense = inputs_like_a_models(tokens, WIDTH, seed)
    mixing = torch.eye(WIDTH) + 0.1 * random_weight(WIDTH, WIDTH, seed=99)
    noises = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed + 1000))
    return dense @ mixing + noise * noises, dense


def missing(inputs: Tensor, dense: Tensor, weight: Tensor, target: Tensor) -> float:
    """‖X_d Wᵀ − X W*ᵀ‖² in float64."""
    return float((dense.double() @ weight.double().T - inputs.double() @ target.double().T).square().sum())


def test_the_statistic_is_what_its_text_says() -> None:
    inputs, dense = changed_inputs(200, 0)
    statistic, count = paired(inputs, dense), len(inputs)
    expected = (dense - inputs).double().T @ inputs.double() / count
    torch.testing.assert_close(statistic.missing(torch.eye(WIDTH)).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        statistic.matrix.double(), inputs.double().T @ inputs.double() / count, rtol=1e-4, atol=1e-6
    )


def test_centred_is_the_statistic_of_centred_inputs() -> None:
    inputs, dense = changed_inputs(200, 0)
    centred = paired(inputs + 3, dense - 1)
    centred.centre()
    expected = paired(inputs - inputs.mean(0), dense - dense.mean(0))
    torch.testing.assert_close(centred.matrix, expected.matrix, rtol=1e-3, atol=1e-3)
    weight = random_weight(OUT, WIDTH)
    torch.testing.assert_close(centred.missing(weight), expected.missing(weight), rtol=1e-3, atol=1e-3)


STILL = torch.tensor([5, 20])


def nearly_still(size: float, tokens: int, seed: int) -> PairedHessian:
    """Of inputs of which two features are always the same, and large, as a norm without gain but with a bias has it."""
    inputs = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed + 1000))
    dense = inputs + 0.1 * noise
    for features in (inputs, dense):
        features[:, STILL] = torch.tensor([size, size / 3])
    return paired(inputs, dense)


@pytest.mark.parametrize("size", [30.0, 100.0, 1000.0])
def test_a_large_feature_that_is_always_the_same_has_no_variance_once_centred(size: float) -> None:
    centred = nearly_still(size, 10_000, 0)
    centred.centre()
    assert (centred.matrix[STILL] == 0).all()
    assert (centred.norms[STILL] == 0).all()
    assert (centred.missing(torch.eye(WIDTH))[:, STILL] == 0).all()
    others = torch.ones(WIDTH).index_fill(0, STILL, 0)
    torch.testing.assert_close(centred.matrix.diagonal(), others, rtol=0.1, atol=0)


def test_what_differs_in_a_feature_that_stands_still_is_still_missed() -> None:
    """As where the pruned model's feature is always 0, and the dense model's is not, which other inputs foretell."""
    inputs = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0))
    dense = inputs.clone()
    inputs[:, 5] = 0
    dense[:, 5] = dense[:, 6]
    centred = paired(inputs, dense)
    centred.centre()
    assert centred.missing(torch.eye(WIDTH))[5, 6] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("size", [30.0, 100.0, 1000.0])
@pytest.mark.parametrize(
    "method", [Alps(dampening_frac=0.05), SparseGPT(), Wanda()], ids=["alps", "sparsegpt", "wanda"]
)
def test_features_that_stand_still_are_no_trouble_where_biases_are_refitted(size: float, method: Method) -> None:
    known, held = nearly_still(size, 10_000, 0), nearly_still(size, 2000, 1)
    recipe = Recipe(method, dense_targets=True)
    solved = recipe.solve(random_weight(OUT, WIDTH), known, NM(2, 4), rows=[OUT], held=held, centred=True)
    assert torch.isfinite(solved.solution.weight).all()
    assert (solved.solution.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_a_hessian_that_rounding_has_spoiled_gives_no_shift() -> None:
    weight, (known, held) = random_weight(OUT, WIDTH), statistics()
    known.upper[3, 3] = -10 * known.upper.diagonal().sum()
    shift = shifted_target(weight, known, held, [OUT])
    assert torch.equal(shift.target, weight)
    assert shift.step == (0.0,)


def test_a_gain_that_is_no_number_is_no_gain() -> None:
    weight, (known, held) = random_weight(OUT, WIDTH), statistics()
    held.upper[3, 3] = torch.nan
    shift = shifted_target(weight, known, held, [OUT], learn_from_all=False)
    assert torch.equal(shift.target, weight)
    assert (shift.step, shift.gain) == ((0.0,), 0.0)


def test_with_plenty_of_tokens_it_is_the_regression_on_the_dense_outputs() -> None:
    weight = random_weight(OUT, WIDTH)
    known, held = (changed_inputs(20_000, seed) for seed in (0, 1))
    shift = shifted_target(weight, paired(*known), paired(*held), [OUT], share=1)
    inputs, dense = (torch.cat(pair).double() for pair in zip(known, held, strict=True))
    truth = torch.linalg.lstsq(inputs, dense @ weight.double().T).solution.T
    found, best = missing(*held, weight, shift.target), missing(*held, weight, truth)
    assert best <= found < 1.1 * best
    part = shifted_target(weight, paired(*known), paired(*held), [OUT], share=0.25)
    torch.testing.assert_close(part.target - weight, 0.25 * (shift.target - weight), rtol=1e-3, atol=1e-4)
    assert 0.4 < part.gain / shift.gain < 0.44  # on a parabola, 7/16 where the whole step is the best
    assert found < 0.5 * missing(*held, weight, weight)
    assert shift.step[0] > 0.9


@pytest.mark.parametrize("tokens", [8, 20, 60, 200])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sample", [3, 128])
def test_the_held_out_error_never_grows(tokens: int, seed: int, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shift is learned from fewer tokens than there are inputs, and is mostly noise; and where few rows
    are looked at to choose the damping."""
    monkeypatch.setattr("llmprune.sparsity.target.SAMPLE", sample)
    weight = random_weight(OUT, WIDTH, seed)
    known, held = changed_inputs(tokens, seed, noise=2.0), changed_inputs(100, seed + 50, noise=2.0)
    statistic, other = paired(*known), paired(*held)
    shift = shifted_target(weight, statistic, other, [OUT])
    # Before the last step, which adds the held-out windows to what is known, the promise is exact.
    gain = missing(*held, weight, weight) / len(held[0]) - shift.gain
    assert shift.gain >= 0
    assert gain >= -1e-3
    assert missing(*held, weight, shift.target) <= 1.001 * missing(*held, weight, weight)


def test_each_linear_of_a_stack_has_its_own_step() -> None:
    """The second linear's dense outputs cannot be predicted from its inputs at all."""
    inputs, dense = changed_inputs(4000, 0)
    weight = random_weight(OUT, WIDTH)
    weight[8:, 12:] = 0
    known = paired(inputs, dense)
    still = torch.cat([dense[:, :12], dense[:, 12:]], 1)
    shift = shifted_target(weight, known, paired(*changed_inputs(4000, 1)), [8, 8])
    alone = shifted_target(weight[:8], paired(inputs, still), paired(*changed_inputs(4000, 1)), [8])
    assert len(shift.step) == 2
    assert shift.step[0] == pytest.approx(alone.step[0], rel=1e-3)
    torch.testing.assert_close(shift.target[:8], alone.target, rtol=1e-3, atol=1e-4)


def statistics() -> tuple[PairedHessian, PairedHessian]:
    return paired(*changed_inputs(500, 0)), paired(*changed_inputs(300, 1))


def test_held_out_windows_can_stay_unseen() -> None:
    """Then they choose the step, but nothing is learned from them: S is that of the other windows."""
    weight, (known, held) = random_weight(OUT, WIDTH), statistics()
    unseen = shifted_target(weight, known, held, [OUT], learn_from_all=False)
    seen = shifted_target(weight, *statistics(), [OUT])
    assert unseen.step == seen.step
    fresh, _ = statistics()
    expected = _shift(fresh.missing(weight), fresh.matrix, unseen.dampening_frac)
    torch.testing.assert_close(unseen.target, weight + unseen.step[0] * expected)
    assert not torch.allclose(unseen.target, seen.target)
    assert torch.equal(known.matrix, fresh.matrix)


def test_what_is_learned_in_the_end_is_learned_from_all_windows() -> None:
    weight, (known, held) = random_weight(OUT, WIDTH), statistics()
    shift = shifted_target(weight, known, held, [OUT])
    both, others = statistics()
    both.merge(others)
    assert torch.equal(known.matrix, both.matrix)
    expected = _shift(both.missing(weight), both.matrix, shift.dampening_frac)
    torch.testing.assert_close(shift.target, weight + shift.step[0] * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [[5], [576, 192, 192], [1, 1000, 1], [3072, 3072]])
def test_some_rows_stand_for_all(rows: list[int]) -> None:
    some, counts = _sample(rows, CPU)
    assert len(some) == sum(counts)
    assert len(some) == len(set(some.tolist())) <= 2 * SAMPLE
    assert len(counts) == len(rows)
    for part, start, count in zip(some.split(counts), [0, *torch.tensor(rows).cumsum(0).tolist()], rows):
        assert all(start <= row < start + count for row in part.tolist())
        assert len(part) == pytest.approx(len(some) * count / sum(rows), abs=2)


def test_equal_inputs_ask_for_no_shift() -> None:
    dense = inputs_like_a_models(300, WIDTH)
    weight = random_weight(OUT, WIDTH)
    shift = shifted_target(weight, paired(dense, dense), paired(dense[:100], dense[:100]), [4, 12])
    assert torch.equal(shift.target, weight)
    assert shift.step == (0.0, 0.0)


def test_the_refitted_bias_gives_the_dense_mean_exactly() -> None:
    inputs, dense = changed_inputs(300, 0)
    inputs, dense = inputs + 2, dense - 1
    weight, pruned, bias = random_weight(OUT, WIDTH), random_weight(OUT, WIDTH, seed=7), random_weight(1, OUT)[0]
    means = MeanInputs.of(paired(inputs[:200], dense[:200]), paired(inputs[200:], dense[200:]))
    new = means.bias(bias, weight, pruned)
    wanted = (dense @ weight.T + bias).mean(0)
    torch.testing.assert_close((inputs @ pruned.T + new).mean(0), wanted, rtol=1e-3, atol=1e-3)
