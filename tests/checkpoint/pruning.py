"""Pruning by hand, for tests that need a pruned model and its rows but no pruner."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.results import PrunedWeight

__all__ = ["prune_by_hand", "rows_of_model"]

_EXPERTS_TRANSPOSED = ("gpt_oss",)  # computes x @ W


def rows_of_model(model: PreTrainedModel, pattern: str = "2:4", scope: str = "group") -> list[PrunedWeight]:
    """One row for every matrix of the decoder layers, routers left out, zeros not yet counted."""
    rows: list[PrunedWeight] = []
    for name, parameter in model.named_parameters():
        if ".layers." not in f".{name}" and ".h." not in name:
            continue
        if "router" in name or "mlp.gate.weight" in name or "bias" in name:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 2:
            rows.append(_row(name, parameter, None, 0 if isinstance(owner, Conv1D) else 1, pattern, scope))
        if parameter.ndim == 3:
            axis = 0 if model.config.model_type in _EXPERTS_TRANSPOSED else 1
            rows += [_row(name, parameter, expert, axis, pattern, scope) for expert in range(len(parameter))]
    return rows


def prune_by_hand(model: PreTrainedModel, pattern: str = "2:4", scope: str = "group") -> list[PrunedWeight]:
    """Zero the first half of every group of four inputs (a valid 2:4, and 50 % of every row), one zero being −0.0."""
    rows = rows_of_model(model, pattern, scope)
    for row in rows:
        matrix = _matrix(model, row)
        matrix[:, 0::4] = 0
        matrix[:, 1::4] = -0.0
    return [_counted(row, int((_matrix(model, row) == 0).sum())) for row in rows]


def _matrix(model: PreTrainedModel, row: PrunedWeight) -> Tensor:
    """(out_features, in_features), a view of the parameter."""
    weight = model.get_parameter(row.parameter).data
    matrix = weight if row.expert is None else weight[row.expert]
    return matrix if row.input_axis == 1 else matrix.T


def _row(name: str, parameter: Tensor, expert: int | None, axis: int, pattern: str, scope: str) -> PrunedWeight:
    sides = parameter.shape[-2:]
    return PrunedWeight(
        name=name if expert is None else f"{name}[{expert}]",
        parameter=name,
        expert=expert,
        input_axis=axis,
        layer=next(int(part) for part in name.split(".") if part.isdigit()),
        shape=(sides[0], sides[1]) if axis == 1 else (sides[1], sides[0]),
        pattern=pattern,
        zeros=0,
        scope=scope,
        error=0.0,
        tokens=0,
        seconds=0.0,
    )


def _counted(row: PrunedWeight, zeros: int) -> PrunedWeight:
    return PrunedWeight(**{**{name: getattr(row, name) for name in row.__dataclass_fields__}, "zeros": zeros})
