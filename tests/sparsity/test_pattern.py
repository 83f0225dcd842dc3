"""Patterns: what people may write, what it means, and what they are told otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.errors import UserError
from llmprune.sparsity.pattern import NM, Pattern, Unstructured, parse_pattern


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        (0.5, Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        (" .5 ", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        ("50 %", Unstructured(0.5)),
        ("62.5%", Unstructured(0.625)),
        ("0.5%", Unstructured(0.005)),
        ("57%", Unstructured(0.57)),
        ("2:4", NM(2, 4)),
        (" 1:4\n", NM(1, 4)),
        ("16:32", NM(16, 32)),
        (NM(3, 7), NM(3, 7)),
        (Unstructured(0.1), Unstructured(0.1)),
    ],
)
def test_what_people_write_is_understood(written: str | float | Pattern, pattern: Pattern) -> None:
    assert parse_pattern(written) == pattern


@pytest.mark.parametrize(
    "written", ["half", "", "%", "2:4:8", "2 : 4", "2:", "-2:4", "0,5", "2/4", "0.5.5%", True, None]
)
def test_what_cannot_be_read_names_the_three_forms(written: str) -> None:
    with pytest.raises(UserError, match=r"fraction \(0\.5\), a percentage \(50%\) or N:M, N kept .* \(2:4\); got"):
        parse_pattern(written)


def test_a_percentage_without_its_sign_is_not_guessed() -> None:
    with pytest.raises(UserError, match=r"fraction below 1.*got 50\. If you meant 50 %, write 50%"):
        parse_pattern(50)
    with pytest.raises(UserError, match=r"got 1\. If you meant 1 %, write 1%"):
        parse_pattern("1")


@pytest.mark.parametrize(
    ("written", "got"),
    [("0", "0"), ("-0.5", "-0.5"), ("nan", "nan")],
)
def test_a_sparsity_lies_between_0_and_1(written: str, got: str) -> None:
    with pytest.raises(
        UserError, match=rf"lies between 0 and 1, both excluded; got {got}\. Write 0\.5 or 50% for half"
    ):
        parse_pattern(written)


@pytest.mark.parametrize("written", ["0%", "100%", "150%", "-5%"])
def test_a_percentage_lies_between_0_and_100(written: str) -> None:
    with pytest.raises(UserError, match=f"more than 0% and less than 100%; got {written}"):
        parse_pattern(written)


@pytest.mark.parametrize("written", ["0:4", "4:4", "5:4", "0:0"])
def test_n_of_m_keeps_some_and_drops_some(written: str) -> None:
    with pytest.raises(
        UserError, match=f"keeps N of every M consecutive inputs, so 0 < N < M is needed; got {written}"
    ):
        parse_pattern(written)


@given(sparsity=st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True, allow_subnormal=False))
def test_a_fraction_survives_being_written(sparsity: float) -> None:
    """To the last digit: reports and configs hold patterns as text, and counts of zeros are made from it."""
    pattern = Unstructured(sparsity)
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(sparsity) == pattern


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(n + 1, 1000))))
def test_n_of_m_survives_being_written(numbers: tuple[int, int]) -> None:
    pattern = NM(*numbers)
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("pattern", "text", "slug"),
    [
        (Unstructured(0.5), "50%", "50pct"),
        (Unstructured(0.07), "7%", "7pct"),
        (Unstructured(0.625), "62.5%", "62.5pct"),
        (Unstructured(1 / 3), "33.33333333333333%", "33.3333pct"),
        (NM(2, 4), "2:4", "2of4"),
    ],
)
def test_how_a_pattern_is_shown(pattern: Pattern, text: str, slug: str) -> None:
    assert (str(pattern), pattern.slug) == (text, slug)


def test_n_counts_the_kept() -> None:
    assert NM(1, 4).sparsity == 0.75
    assert NM(1, 4).zeros_of(8) == 6
    assert NM(3, 7).zeros_of(21) == 12


@given(st.floats(0.001, 0.999), st.integers(0, 10**6))
def test_zeros_are_the_nearest_whole_number(sparsity: float, count: int) -> None:
    zeros = Unstructured(sparsity).zeros_of(count)
    assert 0 <= zeros <= count
    assert abs(zeros - sparsity * count) <= 0.5


def test_which_weights_a_pattern_fits() -> None:
    assert NM(2, 4).fits(8)
    assert not NM(2, 4).fits(10)
    assert not NM(3, 7).fits(8)
    assert Unstructured(0.5).fits(7)
