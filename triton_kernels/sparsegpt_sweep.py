"""SparseGPT's sweep over one block of columns (Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774, §3.2).

Column after column entries are dropped, and the columns to the right make up for it. In torch each column is half a
dozen operations on one row of numbers: on a GPU nearly all of the time goes into launching them. One kernel does the
whole block, with a tile of output rows in registers (rows know nothing of each other).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sparsegpt_sweep", "sparsegpt_sweep_torch"]


def sparsegpt_sweep_torch(
    columns: Tensor, keep: Tensor, factor: Tensor, *, pattern: tuple[int, int] | None = None
) -> Tensor:
    """The same in plain torch, as the paper has it: what `sparsegpt_sweep` is measured against.

    Parameters
    ----------
    columns : (in_features, out_features) of the block, the weight held transposed; pruned in place
    keep : the same shape, bool; read, or written where a pattern is given
    factor : (in_features, in_features), U upper triangular with H⁻¹ = UᵀU, of the block
    pattern : (n, m): of every m columns the n are kept whose loss w² / U_jj² is the highest when the sweep arrives (of
        equal ones the first), m a divisor of the block's columns; None: `keep` says what is kept

    Returns
    -------
    (in_features, out_features), w / U_jj of every entry that was dropped, else 0: what the columns right of the block
    still have to make up for, by `columns_right −= factor[block, right]ᵀ errors`
    """
    diagonal, errors = factor.diagonal(), torch.empty_like(columns)
    for j in range(len(columns)):
        if pattern is not None and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            order = (columns[group] / diagonal[group, None]).abs().sort(dim=0, descending=True, stable=True).indices
            keep[group] = torch.zeros_like(keep[group]).scatter_(0, order[: pattern[0]], True)
        errors[j] = (columns[j] / diagonal[j]).masked_fill(keep[j], 0)
        columns[j] = columns[j].masked_fill(~keep[j], 0)
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return errors


def sparsegpt_sweep(columns: Tensor, keep: Tensor, factor: Tensor, *, pattern: tuple[int, int] | None = None) -> Tensor:
    """One block on a GPU; see `sparsegpt_sweep_torch` for what goes in and comes out.

    Parameters
    ----------
    columns, keep : (in_features, out_features) float32 and bool, contiguous
    factor : (in_features, in_features) float32; may be a block of a larger one

    Raises
    ------
    ValueError : if the tensors do not belong together, or no kernel runs where they are
    """
    count = len(columns)
    shapes = columns.ndim == 2 and keep.shape == columns.shape and factor.shape == (count, count)
    kinds = columns.dtype == factor.dtype == torch.float32 and keep.dtype == torch.bool
    if not shapes or not kinds or not columns.device == keep.device == factor.device:
        got = [f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (columns, keep, factor)]
        raise ValueError(
            "a block of columns is (in_features, out_features) float32, keep the same in bool, and factor "
            f"(in_features, in_features) float32, on one device; got {', '.join(got)}"
        )
    if not (columns.is_contiguous() and keep.is_contiguous()):
        raise ValueError("columns and keep must be contiguous")
    kept, group = pattern or (0, 0)
    if group and (count % group or not 0 <= kept <= group):
        raise ValueError(f"{kept} of every {group} columns cannot be kept of a block of {count}")
    errors = torch.empty_like(columns)
    _sparsegpt_sweep(columns, keep, factor, errors, kept, group)
    return errors


@torch.library.custom_op("llmprune::sparsegpt_sweep", mutates_args=("columns", "keep", "errors"))
def _sparsegpt_sweep(columns: Tensor, keep: Tensor, factor: Tensor, errors: Tensor, kept: int, group: int) -> None:
    from llmprune.triton_kernels._launch import check_device

    check_device(columns, "sparsegpt_sweep")
    if columns.numel():
        from llmprune.triton_kernels._sparsegpt_sweep_kernel import launch_sparsegpt_sweep

        launch_sparsegpt_sweep(columns, keep, factor, errors, kept=kept, group=group)
