"""Zeros and bytes: what each weight will hold, and how large the files will be, saved dense and packed.

Where tensors lie on disk, and which weights lie in them, is asked of the same functions that save and verify a pruned
model; they need names and shapes only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from llmprune.checkpoint.carry import is_computed, not_loaded
from llmprune.checkpoint.layout import SavedWeight, hollow_tensors, saved_weights
from llmprune.checkpoint.stream import DTYPES, header_room
from llmprune.pipeline.plan import Plan
from llmprune.pipeline.survey import Survey
from llmprune.plan.source import DEQUANTIZED, Source
from llmprune.recipe import Recipe
from llmprune.results import PrunedWeight
from llmprune.sparsity.pack import packed_bytes
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.walk.products import ALL, WeightKey

__all__ = ["Sizes", "file_sizes", "planned_weights"]

_METADATA = {"format": "pt"}
"""What files of weights say of themselves."""


@dataclass(frozen=True)
class Sizes:
    """before : bytes of the weights in the source's files, None where they cannot be known
    dense, packed : bytes of the files with weights after the run, in either format
    parameters, zeros : of the model, tied ones once
    carried : bytes that come along from the source although the model does not load them
    weights : per pruned weight, its bytes (dense, packed); what shares a tensor shares its bytes by size
    """

    before: int | None
    dense: int
    packed: int
    parameters: int
    zeros: int
    carried: int
    weights: dict[str, tuple[int, int]]


def planned_weights(survey: Survey, plan: Plan, recipe: Recipe) -> list[PrunedWeight]:
    """A row for every weight that a run would prune, as its report will have it, but for what only the run can tell."""
    rows = []
    for index, (layer, schedule) in enumerate(zip(survey.decoder.layers, survey.schedules, strict=True)):
        patterns, prefix = plan.patterns(index), survey.decoder.prefixes[index]
        for key in (key for station in schedule.stations for key in station.weights):
            parameter, axis = layer.get_parameter(key.parameter), schedule.input_axes[key.parameter]
            sides = tuple(parameter.shape[-2:]) if axis == 1 else tuple(parameter.shape[-2:])[::-1]
            pattern = patterns[key.parameter]
            scope = "group" if isinstance(pattern, NM) else recipe.method.scope
            row = PrunedWeight(
                name="",
                parameter=prefix + key.parameter,
                expert=None,
                input_axis=axis,
                layer=index,
                shape=(sides[0], sides[1]),
                pattern=str(pattern),
                zeros=zeros_of(pattern, sides, scope),
                scope=scope,
                error=None,
                tokens=0,
                seconds=0.0,
            )
            rows += [replace(row, name=f"{prefix}{one}", expert=one.expert) for one in _apart(key, parameter)]
    return rows


def _apart(key: WeightKey, parameter: Tensor) -> list[WeightKey]:
    if key.expert != ALL:
        return [key]
    return [WeightKey(key.parameter, index) for index in range(len(parameter))]


def zeros_of(pattern: Pattern, shape: tuple[int, ...], scope: str) -> int:
    """Zeros of a weight (out_features, in_features), counted out where `scope` says."""
    rows, in_features = shape
    if isinstance(pattern, Unstructured) and scope == "row":
        return rows * pattern.zeros_of(in_features)
    return pattern.zeros_of(rows * in_features)


def file_sizes(model: Any, source: Source, rows: Sequence[PrunedWeight]) -> Sizes:
    """The bytes of a model's files before and after pruning `rows` of it."""
    tensors, held = hollow_tensors(model), saved_weights(model, rows)
    by_name = {row.name: row for row in rows}
    weights = dict.fromkeys(by_name, (0, 0))
    dense = packed = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        smaller = min(size, _packed(tensor, held[name], by_name)) if name in held else size
        dense, packed = dense + size, packed + smaller
        for saved in held.get(name, ()):
            share = _elements(saved, tensor) / tensor.numel()
            before = weights[saved.weight]
            weights[saved.weight] = (before[0] + round(share * size), before[1] + round(share * smaller))
    extra = _carried(model, source)
    return Sizes(
        before=source.file_bytes,
        dense=dense + extra + _dense_header(tensors),
        packed=packed + extra + _packed_header(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        zeros=sum(row.zeros for row in rows),
        carried=extra,
        weights=weights,
    )


def _packed(tensor: Tensor, held: Iterable[SavedWeight], rows: Mapping[str, PrunedWeight]) -> int:
    """Bytes of a packed tensor, by the zeros of the weights in it."""
    saved = list(held)
    in_features = tensor.shape[saved[0].input_axis]
    zeros = 0.0
    for one in saved:
        row = rows[one.weight]
        zeros += row.zeros * _elements(one, tensor) / (row.shape[0] * row.shape[1])
    kept = tensor.numel() - round(zeros)
    return packed_bytes(tensor.numel() // in_features, in_features, kept=kept, element_size=tensor.element_size())


def _elements(saved: SavedWeight, tensor: Tensor) -> int:
    return tensor.numel() if saved.box is None else prod(stop - start for start, stop in saved.box)


def _carried(model: Any, source: Source) -> int:
    """Bytes of tensors that a run takes over from the source's files without loading them."""
    if source.stored is None or source.converted == DEQUANTIZED:
        return 0
    left = not_loaded(model, list(source.stored))
    return sum(source.stored[n].nbytes for n in left if not is_computed(n, len(source.stored[n].shape)))


def _dense_header(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that safetensors writes before these tensors, in a single file."""
    end = 0
    header: dict[str, Any] = {"__metadata__": _METADATA}
    for name, tensor in sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = DTYPES.get(tensor.dtype, "F32")
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return 8 + _whole(len(json.dumps(header, separators=(",", ":"))))


def _packed_header(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that `llmprune.checkpoint.stream` leaves before a file's tensors and their indexes."""
    room = sum(header_room(name, tensor.ndim) for name, tensor in tensors.items())
    return 8 + _whole(room + len(json.dumps(_METADATA)) + 32)


def _whole(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // 8) * 8
