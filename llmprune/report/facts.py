"""What a page shows of one document, in the shape in which it is shown.

A model has up to tens of thousands of weights. They are seen as a grid: a row for each kind of linear, a column for
each decoder layer. The experts of one stack are one cell.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath
from typing import Any

__all__ = [
    "Cell",
    "Dense",
    "Grid",
    "dense_bytes",
    "grid_of",
    "mean_error",
    "method_of",
    "model_name",
    "note_counts",
    "pattern_of",
    "skipped_groups",
]

_IN_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+?)(?:\.weight)?(?:\[\d+\])?$")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Cell:
    """The pruned weights of one parameter: one matrix, or all experts of a stack."""

    layer: int
    linear: str
    matrices: int
    elements: int
    zeros: int
    error: float | None
    """Relative output error, the mean over experts where it is known; None if it is not for any."""
    worst: float | None
    """That of the worst expert."""
    patterns: tuple[str, ...]
    tokens: int
    """Calibration tokens that met it, all experts together."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.elements


@dataclass(frozen=True)
class Dense:
    """A matrix of a layer that was left dense, and why."""

    elements: int
    reason: str


@dataclass(frozen=True)
class Grid:
    """All matrices of the decoder layers: `layers` and `linears` are the axes, in the model's order."""

    layers: tuple[int, ...]
    linears: tuple[str, ...]
    cells: Mapping[tuple[int, str], Cell]
    dense: Mapping[tuple[int, str], Dense]

    def sparsity(self, layer: int) -> float | None:
        """Fraction of zeros in the matrices of a layer, those left dense counted too; None if it has none."""
        cells = [cell for (at, _), cell in self.cells.items() if at == layer]
        dense = sum(held.elements for (at, _), held in self.dense.items() if at == layer)
        elements = sum(cell.elements for cell in cells) + dense
        return sum(cell.zeros for cell in cells) / elements if elements else None

    def error(self, layer: int) -> float | None:
        """Mean output error of the linears of a layer; None if none was measured."""
        errors = [cell.error for (at, _), cell in self.cells.items() if at == layer and cell.error is not None]
        return statistics.fmean(errors) if errors else None

    def of_linear(self, linear: str) -> list[Cell]:
        """The cells of one row, layer by layer."""
        return [self.cells[layer, linear] for layer in self.layers if (layer, linear) in self.cells]

    @property
    def measured(self) -> list[tuple[float, Cell]]:
        """Every cell with an error, the largest first."""
        found = [(cell.error, cell) for cell in self.cells.values() if cell.error is not None]
        return sorted(found, key=lambda pair: -pair[0])


def grid_of(document: Mapping[str, Any]) -> Grid:
    """The grid of a document's pruned and skipped weights."""
    stacks: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in document["pruned"]:
        stacks.setdefault((row["layer"], _linear(row["parameter"])), []).append(row)
    dense: dict[tuple[int, str], Dense] = {}
    for row in document["skipped"]:
        if (found := _IN_LAYER.match(row["name"])) and (place := (int(found[1]), found[2])) not in stacks:
            held = dense[place].elements if place in dense else 0
            dense[place] = Dense(held + prod(row["shape"]), row["reason"])
    count = max([at + 1 for at, _ in (*stacks, *dense)], default=0)
    linears = dict.fromkeys(linear for _, linear in (*stacks, *dense))
    cells = {place: _cell(place, rows) for place, rows in stacks.items()}
    return Grid(tuple(range(max(count, document.get("model", {}).get("layers", 0)))), tuple(linears), cells, dense)


def _linear(parameter: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` is `mlp.up_proj` in every layer."""
    found = _IN_LAYER.match(parameter)
    return found[2] if found else parameter


def _cell(place: tuple[int, str], rows: list[Mapping[str, Any]]) -> Cell:
    errors = [row["error"] for row in rows if row["error"] is not None and math.isfinite(row["error"])]
    return Cell(
        layer=place[0],
        linear=place[1],
        matrices=len(rows),
        elements=sum(prod(row["shape"]) for row in rows),
        zeros=sum(row["zeros"] for row in rows),
        error=statistics.fmean(errors) if errors else None,
        worst=max(errors, default=None),
        patterns=tuple(dict.fromkeys(row["pattern"] for row in rows)),
        tokens=sum(row["tokens"] for row in rows),
    )


def mean_error(grid: Grid) -> float | None:
    """Of all cells that have one; None if none has."""
    errors = [error for error, _ in grid.measured]
    return statistics.fmean(errors) if errors else None


def model_name(document: Mapping[str, Any]) -> str:
    """What to call the model: its own name, never a path of somebody's machine."""
    if name := document.get("model", {}).get("name"):
        return str(name)
    given = str(document["source"].get("id") or "model")
    return PurePosixPath(given.replace("\\", "/")).name or given


_METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "alps": "ALPS"}


def method_of(document: Mapping[str, Any]) -> str:
    """How it was pruned, in words: the method, and the effort if one was asked for."""
    config = document["config"]
    method = str(config.get("method") or "")
    effort = f" (effort {config['effort']})" if config.get("effort") else ""
    return _METHODS.get(method, method) + effort


def pattern_of(document: Mapping[str, Any]) -> str:
    """The pattern of most weights, or where they differ too much for that, what was asked for."""
    patterns = Counter(row["pattern"] for row in document["pruned"])
    pattern, count = patterns.most_common(1)[0] if patterns else ("", 0)
    if 2 * count > sum(patterns.values()):
        return pattern
    return _as_asked(str(document["config"].get("sparsity", "")))


def _as_asked(sparsity: str) -> str:
    """A fraction in per cent; 2:4 and 50% as they are."""
    try:
        return f"{100 * float(sparsity):g}%"
    except ValueError:
        return sparsity


def dense_bytes(document: Mapping[str, Any]) -> int:
    """Bytes of all tensors as they are without packing."""
    return sum(prod(held["shape"]) * _bytes_of(held["dtype"]) for held in document["tensors"].values())


def _bytes_of(dtype: str) -> int:
    """float32 has 4, bfloat16 2, float8_e4m3fn 1, bool 1."""
    bits = _BITS.search(dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1


def note_counts(document: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What went other than usual with single weights, and with how many."""
    return Counter(note for row in document["pruned"] for note in row["notes"]).most_common()


def skipped_groups(document: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """The matrices that were left dense, alike ones together: (name, reason, how many, elements in all)."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in document["skipped"]:
        found = _IN_LAYER.match(row["name"])
        name = found[2] if found else str(row["name"])
        groups.setdefault((name, row["reason"]), []).append(prod(row["shape"]))
    for (name, reason), sizes in groups.items():
        yield name, reason, len(sizes), sum(sizes)
