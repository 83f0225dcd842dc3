"""SparseGPT's sweep, interpreted: against its plain-torch twin in float64, with fresh memory full of NaN."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from llmprune.methods.sparsegpt import _BlockMasks, _NMMasks, _sweep
from llmprune.sparsity.pattern import NM, Unstructured
from llmprune.triton_kernels.sparsegpt_sweep import sparsegpt_sweep, sparsegpt_sweep_torch
from tests.triton.sweeps import block_of, check_sweep


@pytest.mark.parametrize(
    ("count", "rows", "pattern"), [(16, 5, (2, 4)), (12, 40, (1, 3)), (24, 3, (4, 8)), (20, 33, None), (1, 2, None)]
)
def test_a_block_is_swept_as_its_twin_does_in_float64(count: int, rows: int, pattern: tuple[int, int] | None) -> None:
    check_sweep(block_of(count, rows), pattern)


def test_a_block_of_a_larger_factor_is_read_where_it_lies() -> None:
    columns, keep, factor = block_of(12, 3)
    larger = torch.full((40, 50), torch.nan)
    larger[8:20, 30:42] = factor
    check_sweep((columns, keep, larger[8:20, 30:42]), (2, 4))


def test_of_equal_losses_the_first_stay() -> None:
    columns, keep = torch.ones(8, 3), torch.zeros(8, 3, dtype=torch.bool)
    sparsegpt_sweep(columns, keep, torch.eye(8), pattern=(2, 4))
    assert keep.T.tolist() == 3 * [2 * [True, True, False, False]]


def test_no_rows_are_swept_at_once() -> None:
    assert sparsegpt_sweep(torch.empty(4, 0), torch.ones(4, 0, dtype=torch.bool), torch.eye(4)).shape == (4, 0)


def test_what_does_not_fit_is_refused() -> None:
    columns, keep, factor = block_of(8, 4)
    for wrong, sentence in (
        ((columns.double(), keep, factor), "a block of columns is"),
        ((columns, keep[:4], factor), "a block of columns is"),
        ((columns, keep.int(), factor), "a block of columns is"),
        ((columns.T.contiguous().T, keep, factor), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sparsegpt_sweep(*wrong)
    with pytest.raises(ValueError, match="2 of every 3 columns cannot be kept of a block of 8"):
        sparsegpt_sweep(columns, keep, factor, pattern=(2, 3))


def test_the_operation_keeps_its_promises_to_torch() -> None:
    columns, keep, factor = block_of(8, 4)
    arguments = (columns, keep, factor, torch.zeros_like(columns), 2, 4)
    torch.library.opcheck(
        torch.ops.llmprune.sparsegpt_sweep.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_the_twin_is_the_paper() -> None:
    """Dropping one entry, the best change of the others is a column of the inverse Hessian."""
    columns, keep, factor = (part.double() if part.is_floating_point() else part for part in block_of(6, 1))
    keep[:], before = True, columns.clone()
    keep[0] = False
    sparsegpt_sweep_torch(columns, keep, factor)
    inverse = factor.T @ factor
    torch.testing.assert_close(columns, before - inverse[:, :1] * before[0] / inverse[0, 0])


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.4)], ids=str)
def test_the_methods_two_ways_agree(pattern: NM | Unstructured) -> None:
    """Strip by strip, as on a CPU, and at once, as on a GPU."""
    found = []
    for way in ("strips", "at once"):
        columns, keep, factor = block_of(32, 9)
        masks = _NMMasks(pattern) if isinstance(pattern, NM) else _BlockMasks(pattern, columns.T, [4, 5])
        swept = masks.swept_at_once if way == "at once" else lambda *block, masks=masks: _sweep(*block, masks)
        found.append((swept(columns, keep, factor), columns, keep))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
