"""A stack in parts: every row belongs to one of them, and no linear is cut where that is forbidden."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmprune.sparsity.parts import parts_of

stacks = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(stacks, st.integers(1, 9), st.booleans())
def test_every_row_is_in_one_part_and_its_linear_is_known(rows: list[int], count: int, whole: bool) -> None:
    parts = parts_of(rows, count, whole_linears=whole)
    assert len(parts) == count
    assert (parts[0].start, parts[-1].stop) == (0, sum(rows))
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(part.stop - part.start == sum(part.rows) for part in parts)
    assert [sum(column) for column in zip(*(part.rows for part in parts))] == rows


@given(stacks, st.integers(1, 9))
def test_a_whole_linear_is_never_cut(rows: list[int], count: int) -> None:
    for part in parts_of(rows, count, whole_linears=True):
        assert all(own in (0, size) for own, size in zip(part.rows, rows))


@given(stacks, st.integers(1, 9))
def test_rows_are_divided_evenly_where_they_may_be(rows: list[int], count: int) -> None:
    sizes = [part.stop - part.start for part in parts_of(rows, count, whole_linears=False)]
    assert max(sizes) - min(sizes) <= 1


def test_gate_and_up_go_to_two_processes_and_a_single_linear_to_one() -> None:
    assert [part.rows for part in parts_of([8, 8], 2, whole_linears=True)] == [(8, 0), (0, 8)]
    assert [part.rows for part in parts_of([8], 3, whole_linears=True)] == [(0,), (8,), (0,)]
