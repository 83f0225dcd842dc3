"""What a packed tensor is on disk, and how a tensor of a checkpoint becomes one and comes back.

The values stand under the tensor's own name, and their shape is not the dense one: a reader that knows nothing of it
stops there, where a name that it does not know would cost a warning and random weights. The index stands under the
name + "_index". config.json says which tensors these are, under `quantization_config`, because that is where
transformers looks for a reader of another format. docs/packed.md describes it for people who want to write one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import Tensor

from llmprune.checkpoint.report import TensorRecord
from llmprune.checkpoint.stream import DTYPES
from llmprune.errors import UserError
from llmprune.sparsity.pack import ANY, Packed, as_rows, find_pattern, from_rows, pack, unpack

__all__ = ["FORMAT", "METHOD", "Entry", "dense_tensor", "index_name", "pack_tensor", "packed_config", "packed_entries"]

METHOD = "llmprune"
"""`quant_method` of our checkpoints."""

FORMAT = 1

_USUAL = ("2:4", "4:8")
"""Patterns that are looked for where no report says what was pruned."""


@dataclass(frozen=True)
class Entry:
    """One packed tensor, as config.json describes it."""

    pattern: str
    """As "2:4", or "any"."""
    shape: tuple[int, ...]
    """Of the dense tensor, as it is stored."""
    input_axis: int
    """The axis of that shape that runs over the weight's inputs."""
    kept: int
    """How many values are stored."""

    @property
    def elements(self) -> int:
        """Of the dense tensor."""
        return prod(self.shape)


def index_name(name: str) -> str:
    """Where the index of the packed tensor `name` stands."""
    return f"{name}_index"


def packed_config(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these packed tensors."""
    weights = {name: {**asdict(entry), "shape": list(entry.shape)} for name, entry in sorted(entries.items())}
    return {"quant_method": METHOD, "format": FORMAT, "weights": weights}


def packed_entries(config: Mapping[str, Any]) -> dict[str, Entry] | None:
    """The packed tensors that a config.json names; None if the checkpoint is not one of ours.

    Raises
    ------
    UserError
        if a newer llmprune wrote it, or it is damaged.
    """
    ours = config.get("quantization_config")
    if not isinstance(ours, Mapping) or ours.get("quant_method") != METHOD:
        return None
    if ours.get("format") != FORMAT:
        raise UserError(
            f"config.json says packed format {ours.get('format')}; this llmprune reads format {FORMAT}: "
            "update llmprune."
        )
    try:
        return {
            name: Entry(str(row["pattern"]), tuple(map(int, row["shape"])), int(row["input_axis"]), int(row["kept"]))
            for name, row in ours["weights"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"quantization_config of config.json is damaged ({error!r}): get the file again.") from error


def pack_tensor(tensor: Tensor, record: TensorRecord | None) -> tuple[Entry, Packed] | None:
    """Pack a tensor of a checkpoint; None if it stays as it is, because dense is as small.

    Parameters
    ----------
    tensor : as it is stored
    record : what the report says of it; None: there is no report, so the inputs are taken to be the last axis
    """
    if tensor.dtype not in DTYPES or not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
        return None
    axis, candidates = _told(tensor, record)
    rows = as_rows(tensor, axis)
    packed = pack(rows, find_pattern(rows, candidates))
    if packed.nbytes >= tensor.nbytes:
        return None
    return Entry(packed.pattern, tuple(tensor.shape), axis, packed.values.numel()), packed


def dense_tensor(name: str, entry: Entry, values: Tensor, index: Tensor) -> Tensor:
    """The tensor as it was before it was packed.

    Raises
    ------
    UserError
        if the parts do not fit together. It names the tensor.
    """
    if not 0 <= entry.input_axis < len(entry.shape):
        raise UserError(
            f"{name}: config.json says input_axis {entry.input_axis} of shape {entry.shape}: it is damaged."
        )
    in_features = entry.shape[entry.input_axis]
    rows = prod(entry.shape) // in_features if in_features else 0
    if index.ndim != 2 or index.shape[0] != rows or values.numel() != entry.kept:
        raise UserError(
            f"{name}: config.json says shape {entry.shape} and {entry.kept} values; got {values.numel()} and an index "
            f"of {tuple(index.shape)}: the files do not belong together."
        )
    try:
        return from_rows(unpack(Packed(values, index, entry.pattern, in_features)), entry.shape, entry.input_axis)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _told(tensor: Tensor, record: TensorRecord | None) -> tuple[int, Sequence[str]]:
    """Axis over the inputs, and N:M patterns to try. A stack of experts with different patterns is "any"."""
    if record is None or record.shape != tuple(tensor.shape):
        return tensor.ndim - 1, _USUAL
    axes = {weight.input_axis for weight in record.weights}
    patterns = {weight.pattern for weight in record.weights}
    only = patterns.pop() if len(axes) == len(patterns) == 1 else ANY
    return axes.pop(), [only] if ":" in only else []
