"""Statistics against sums in float64, in any order, in any dtype, and with what must not pass."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.errors import NumericError
from llmprune.sparsity import statistics
from llmprune.sparsity.statistics import FeatureNorm, Hessian, PairedHessian, Statistic, factor_dtype, mixed

CPU = torch.device("cpu")
KINDS: list[type[Statistic]] = [FeatureNorm, Hessian]
each_kind = pytest.mark.parametrize("kind", KINDS)


def random_inputs(tokens: int, in_features: int, seed: int = 0) -> Tensor:
    """Inputs (tokens, in_features) float32 with features of very different sizes."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, in_features, generator=made) * torch.logspace(-2, 2, in_features)


def summed(kind: type[Statistic], *batches: Tensor) -> Statistic:
    statistic = kind(batches[0].shape[1], CPU)
    for batch in batches:
        statistic.update(batch)
    return statistic


def value(statistic: Statistic) -> Tensor:
    """What a method reads."""
    return statistic.norms if isinstance(statistic, FeatureNorm) else statistic.matrix  # type: ignore[attr-defined]


def truth(kind: type[Statistic], inputs: Tensor) -> Tensor:
    """The same in float64, from its definition."""
    inputs = inputs.double()
    gram = inputs.T @ inputs / len(inputs)
    return gram.diagonal().sqrt() if kind is FeatureNorm else gram


def error(statistic: Statistic, expected: Tensor) -> float:
    """Largest error relative to the sizes of the features that meet in an entry."""
    sizes = expected if expected.dim() == 1 else expected.diagonal().sqrt().outer(expected.diagonal().sqrt())
    return float(((value(statistic).double() - expected).abs() / sizes).max())


@each_kind
@pytest.mark.parametrize("in_features", [1, 7, 8, 9, 31, 32])
def test_sums_are_right_around_the_size_of_a_block(
    kind: type[Statistic], in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 8)
    inputs = random_inputs(200, in_features)
    statistic = summed(kind, inputs)
    assert error(statistic, truth(kind, inputs)) < 1e-6
    assert statistic.tokens == 200
    assert value(statistic).dtype == torch.float32


def test_sums_are_right_above_the_real_block() -> None:
    inputs = random_inputs(300, statistics.BLOCK + 9)
    hessian = summed(Hessian, inputs)
    assert error(hessian, truth(Hessian, inputs)) < 1e-6
    assert torch.equal(value(hessian), value(hessian).T)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(kind: type[Statistic], dtype: torch.dtype) -> None:
    inputs = random_inputs(2000, 24).to(dtype)
    batches = inputs.split(100)  # added to a half-precision sum, the later ones would be rounded away
    assert error(summed(kind, *batches), truth(kind, inputs)) < 1e-6


@each_kind
def test_squares_beyond_float16_do_not_overflow(kind: type[Statistic]) -> None:
    inputs = torch.full((4, 3), 60_000.0, dtype=torch.float16)
    statistic = summed(kind, inputs)
    statistic.check()
    assert error(statistic, truth(kind, inputs)) < 1e-6


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.randoms(use_true_random=False), st.sampled_from(KINDS))
@settings(deadline=None, max_examples=40)
def test_neither_order_nor_batches_nor_processes_matter(
    sizes: list[int], order: random.Random, kind: type[Statistic]
) -> None:
    """Batches of any size, also none, in any order, summed by one or two who merge."""
    inputs = random_inputs(sum(sizes) + 1, 11, seed=sum(sizes))
    batches = list(inputs.split([*sizes, 1]))
    order.shuffle(batches)
    half = len(batches) // 2
    merged, other = summed(kind, *batches[half:]), kind(11, CPU)
    for batch in batches[:half]:
        other.update(batch)
    merged.merge(other)
    assert merged.tokens == len(inputs)
    assert error(merged, truth(kind, inputs)) < 1e-5


@each_kind
def test_a_view_counts_as_its_copy(kind: type[Statistic]) -> None:
    """Inputs may be a slice of what the model computed."""
    inputs = random_inputs(40, 50)
    view = inputs.T[5:25, ::2].T
    assert torch.allclose(value(summed(kind, view)), value(summed(kind, view.contiguous())))


@each_kind
def test_no_token_at_all_is_zero_and_not_nan(kind: type[Statistic]) -> None:
    statistic = kind(3, CPU)
    statistic.update(torch.empty(0, 3))
    assert statistic.tokens == 0
    assert (value(statistic) == 0).all()


@each_kind
def test_what_a_method_reads_is_its_own(kind: type[Statistic]) -> None:
    """SparseGPT factors the matrix in place."""
    statistic = summed(kind, random_inputs(20, 5))
    before = value(statistic).clone()
    value(statistic).zero_()
    assert torch.equal(value(statistic), before)


@each_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 4, 10])
def test_nan_and_inf_are_found(kind: type[Statistic], bad: float, column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 4)
    inputs = random_inputs(20, 11)
    statistic = summed(kind, inputs)
    statistic.check()
    inputs[7, column] = bad
    statistic.update(inputs)
    statistic.update(random_inputs(20, 11, seed=1))  # what follows does not hide it
    with pytest.raises(NumericError, match=rf"in 1 of 11 features \(first: {column}\).*--dtype bfloat16 or float32"):
        statistic.check()


@each_kind
def test_scaling_changes_the_weight_of_a_statistic_and_not_its_value(kind: type[Statistic]) -> None:
    statistic = summed(kind, random_inputs(30, 6))
    before = value(statistic).clone()
    half = statistic.scaled(0.5)
    assert half.tokens == 15
    assert torch.allclose(value(half), before)
    half.update(random_inputs(30, 6, seed=1))
    assert torch.equal(value(statistic), before)  # no memory shared


@each_kind
@pytest.mark.parametrize(("own_tokens", "trusted", "own_share"), [(10, 40, 0.25), (40, 40, 1.0), (50, 40, 1.0)])
def test_the_pool_stands_in_for_missing_tokens(
    kind: type[Statistic], own_tokens: int, trusted: float, own_share: float
) -> None:
    own, pool = random_inputs(own_tokens, 6), 3 * random_inputs(200, 6, seed=1)
    result = mixed(summed(kind, own), summed(kind, pool), trusted)
    square = 2 if kind is FeatureNorm else 1  # norms are roots of what is mixed
    expected = own_share * truth(kind, own) ** square + (1 - own_share) * truth(kind, pool) ** square
    assert error(result, expected ** (1 / square)) < 1e-5
    assert result.tokens == pytest.approx(max(own_tokens, trusted))


@each_kind
def test_the_pool_stands_alone_where_no_token_came(kind: type[Statistic]) -> None:
    pool = summed(kind, random_inputs(200, 6))
    before = value(pool).clone()
    result = mixed(kind(6, CPU), pool, 40)
    assert torch.allclose(value(result), before)
    result.update(random_inputs(5, 6))
    assert torch.equal(value(pool), before)  # the next expert meets it unchanged


@each_kind
def test_an_empty_pool_adds_nothing(kind: type[Statistic]) -> None:
    own = random_inputs(10, 6)
    assert error(mixed(summed(kind, own), kind(6, CPU), 40), truth(kind, own)) < 1e-6
    empty = mixed(kind(6, CPU), kind(6, CPU), 40)
    assert empty.tokens == 0
    assert (value(empty) == 0).all()


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as an NVIDIA GPU has them: of bfloat16 factors, in float32."""
    mm = torch.mm

    def product(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        mm(left.to("meta"), right.to("meta"), out_dtype=out_dtype)  # torch knows such a product
        return mm(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(statistics, "factor_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(torch, "mm", product)


def pairs(dtype: torch.dtype, device: str) -> tuple[PairedHessian, Tensor, Tensor]:
    """A statistic with its inputs and the dense ones, (2000, BLOCK + 9), added in twenty batches."""
    inputs = random_inputs(2000, statistics.BLOCK + 9).to(dtype)
    dense = (inputs.float() + random_inputs(2000, statistics.BLOCK + 9, seed=1)).to(dtype)
    statistic = PairedHessian(inputs.shape[1], torch.device(device))
    for batch, other in zip(inputs.to(device).split(100), dense.to(device).split(100), strict=True):
        statistic.update(batch)
        statistic.compare(batch, other)
    return statistic, inputs, dense


def errors(statistic: PairedHessian, inputs: Tensor, dense: Tensor) -> tuple[float, float]:
    """Of the Hessian and of the cross moments, largest, relative to the sizes of the features that meet."""
    cross = (dense.double() - inputs.double()).T @ inputs.double() / len(inputs)
    sizes = truth(FeatureNorm, inputs)
    off = (
        statistic.missing(torch.eye(inputs.shape[1], device=statistic.cross.device)).cpu().double() - cross
    ).abs() / sizes.outer(sizes)
    hessian = (statistic.matrix.cpu().double() - truth(Hessian, inputs)).abs() / sizes.outer(sizes)
    return float(hessian.max()), float(off.max())


@pytest.mark.usefixtures("like_a_gpu")
def test_bfloat16_inputs_of_a_gpu_are_multiplied_as_they_are_and_summed_in_float32() -> None:
    statistic, inputs, dense = pairs(torch.bfloat16, "cpu")
    hessian, cross = errors(statistic, inputs, dense)
    assert hessian < 1e-5
    assert cross < 1e-3  # the difference is rounded to bfloat16
    assert {tensor.dtype for tensor in statistic.addends()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "device", "factors"),
    [
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.float16, "cuda", torch.float32),  # the difference of two such numbers may be more than float16 can hold
        (torch.float32, "cuda", torch.float32),
        (torch.bfloat16, "cpu", torch.float32),
    ],
)
def test_only_bfloat16_on_an_nvidia_gpu_is_multiplied_as_it_is(
    dtype: torch.dtype, device: str, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert factor_dtype(dtype, torch.device(device)) == factors
    monkeypatch.setattr(torch.version, "cuda", None)  # as it is with ROCm, whose devices are called the same
    assert factor_dtype(dtype, torch.device(device)) == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_on_a_gpu_are_those_of_float64(dtype: torch.dtype) -> None:
    hessian, cross = errors(*pairs(dtype, "cuda"))
    assert hessian < 1e-5
    assert cross < (1e-3 if dtype == torch.bfloat16 else 1e-5)
