"""Packed tensors that become dense while transformers loads them, one weight at a time.

transformers merges a checkpoint's tensors by converters: patterns of keys that belong together, and operations on what
was found. An `Unpacking` is a converter that also takes the indices in, and whose first operation turns pairs of values
and index into dense tensors, so that all operations after it see what they would have seen in a dense checkpoint.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from llmprune.runtime.placement import INDEX
from llmprune.sparsity.pack import ANY, Packed, from_rows, unpack

__all__ = ["Unpack", "Unpacking", "exactly"]

About = tuple[list[int], int]
"""A weight's dense shape as stored, and its axis over the inputs."""


class Unpack(ConversionOps):
    """Values and index → dense; what was stored dense stays.

    about : by parameter of the model and pattern of the converter, what the tensors found by that pattern are
    alone : there is no operation after this one, so the result goes by the parameter's own name
    """

    def __init__(self, about: dict[str, dict[str, About]], *, alone: bool = False) -> None:
        self.about, self.alone = about, alone

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        """transformers copies a converter for every parameter; the table is read only."""
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """{pattern: tensors, pattern + "_index": indices} → {pattern: dense tensors}, in the order of the keys."""
        name, dense = kwargs["full_layer_name"], dict[str, Any]()
        for pattern, (shape, axis) in self.about.get(name, {}).items():
            indices = input_dict.pop(_of_index(pattern), [])
            dense[pattern] = _unpacked(input_dict[pattern], indices, shape, axis)
        if self.alone:
            ((tensor,),) = dense.values()
            return {name: tensor}
        return {pattern: dense.get(pattern, tensors) for pattern, tensors in input_dict.items()}


def _unpacked(found: list[Tensor], indices: list[Tensor], shape: list[int], axis: int) -> list[Tensor]:
    """Each of `found` dense. Both lists are in the order of the keys, but only a packed one has an index."""
    left = indices[::-1]
    for position, values in enumerate(found):
        if [*values.shape] == shape:
            continue
        packed = Packed(values.flatten(), left.pop(), ANY, shape[axis])  # the bitmap alone says where all stand
        found[position] = from_rows(unpack(packed), shape, axis)
    if left:
        raise ValueError(f"{len(left)} indices are left over")
    return found


class Unpacking(WeightConverter):
    """A converter with `Unpack` before its own operations."""

    __slots__ = ()

    def __init__(self, sources: list[str], targets: list[str], operations: list[Any]) -> None:
        # Past WeightConverter's own check: many sources and many targets are fine if half of the sources are indices.
        # An index comes first: in transformers before 5.20 the weight's pattern would take its key too.
        WeightTransform.__init__(self, [_of_index(source) for source in sources] + sources, targets)
        self.operations, self.force_cpu = operations, False

    @classmethod
    def before(cls, converter: Any, about: dict[str, dict[str, About]]) -> Unpacking:
        """`converter`, which then merges what was unpacked."""
        operations = [Unpack(about), *converter.operations]
        made = cls(list(converter.source_patterns), list(converter.target_patterns), operations)
        made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        made.force_cpu = converter.force_cpu
        return made


def exactly(key: str, target: str, about: About) -> Unpacking:
    """A converter for one tensor: `key` after all renamings, `target` as the model calls it."""
    pattern = f"^{re.escape(key)}$"
    return Unpacking([pattern], [key], [Unpack({target: {pattern: about}}, alone=True)])


def _of_index(pattern: str) -> str:
    """The pattern that finds the index of what `pattern` finds."""
    return pattern[:-1] + INDEX + "$" if pattern.endswith("$") else pattern + INDEX
