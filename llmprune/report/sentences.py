"""What a page says in words of one run, and the rows of its tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.report.document import Run
from llmprune.report.facts import Cell, Grid, dense_bytes, method_of
from llmprune.report.measures import Measure
from llmprune.report.words import as_bytes, as_count, as_duration, as_figure, as_percent, as_setting

__all__ = ["cell_told", "error_told", "lede", "plan_row", "sameness_told", "source", "tiles", "time_told", "tuned_told"]


def lede(document: Mapping[str, Any], measures: list[Measure]) -> Iterator[str]:
    """What was done and what it cost, in a few sentences."""
    counts, layers = document["totals"], {row["layer"] for row in document["pruned"]}
    share = counts["pruned_zeros"] / max(counts["pruned_parameters"], 1)
    where = f"{counts['pruned_weights']:,} weights in {len(layers)} decoder layers"
    yield f"{where} have {share:.0%} of their entries set to zero by {method_of(document)}."
    done = [measure for measure in measures if measure.pruned is not None]
    if done and done[0].pruned is not None and done[0].kind == "perplexity":
        dense, pruned = done[0].dense.value, done[0].pruned.value
        yield (
            f"Perplexity on {done[0].subject} goes from {as_figure(dense)} to {as_figure(pruned)}, "
            f"{as_figure(pruned / dense, 3)} times the dense model's."
        )
    if done and (divergence := done[0].divergence) is not None:
        yield f"For {divergence.agreement.value:.0%} of the tokens its first choice is the dense model's."


def tiles(run: Run, measures: list[Measure]) -> Iterator[dict[str, str]]:
    """The few numbers at the top: name, number, detail."""
    document = run.document
    counts = document["totals"]
    of_pruned = counts["pruned_zeros"] / max(counts["pruned_parameters"], 1)
    of_all = f"{as_percent(counts['zeros'] / counts['parameters'])} of all {as_count(counts['parameters'])} parameters"
    yield _tile("Zeros in pruned weights", as_percent(of_pruned), of_all)
    if measures:
        yield from _quality(measures[0])
    if run.saved_bytes is not None:
        share = run.saved_bytes / dense_bytes(document)
        told = f"{share:.0%} of dense, packed" if share < 0.98 else "as large as dense: zeros are stored"
        yield _tile("Weights on disk", as_bytes(run.saved_bytes), told)
    if seconds := document.get("seconds", {}):
        peak = max(document.get("peak_memory_bytes", {}).values(), default=0)
        told = f"{as_bytes(peak)} of memory at most" if peak else "wall time"
        yield _tile("Whole job", as_duration(sum(seconds.values())), told)


def _quality(first: Measure) -> Iterator[dict[str, str]]:
    if first.pruned is not None and first.recovery is not None:
        change = f"{as_figure(first.dense.value)} → {as_figure(first.pruned.value)}"
        yield _tile(first.metric.capitalize(), change, f"{first.recovery:.1f}% recovered, {first.subject}")
    if first.divergence is not None:
        told = f"KL {as_figure(first.divergence.kl.value, 3)} nats a token"
        yield _tile("Same top token as dense", as_percent(first.divergence.agreement.value), told)


def _tile(name: str, number: str, detail: str) -> dict[str, str]:
    return {"name": name, "number": number, "detail": detail}


def sameness_told(row: Mapping[str, Any]) -> str:
    """How long a generation of the pruned model is the dense one's."""
    same = row["same_tokens"]
    if not same:
        return "differs from the first token on"
    if same >= row["tokens"]:
        return f"the same {same} tokens"
    return f"the same for {same} token{'' if same == 1 else 's'}"


def error_told(grid: Grid) -> str:
    """The middle and the worst of the map, in words."""
    if not grid.measured:
        return ""
    worst, cell = grid.measured[0]
    middle = statistics.median(error for error, _ in grid.measured)
    told = f"Half of them are below {as_figure(middle, 3)}; the largest, {as_figure(worst, 3)}, is "
    told += f"{cell.linear} of layer {cell.layer}."
    if any(held.matrices > 1 for _, held in grid.measured):
        told += " A stack of experts is one cell, their mean."
    return told + (" Hollow cells were left dense or met no token." if grid.dense else "")


def cell_told(grid: Grid, layer: int, linear: str) -> str:
    """What the table behind the map says of one place in it."""
    if (cell := grid.cells.get((layer, linear))) is not None:
        return "n/a" if cell.error is None else as_figure(cell.error, 3)
    return "dense" if (layer, linear) in grid.dense else ""


def plan_row(grid: Grid, linear: str) -> dict[str, Any]:
    """What was done to one kind of linear in all layers."""
    cells = grid.of_linear(linear)
    errors = [cell.error for cell in cells if cell.error is not None]
    elements = sum(cell.elements for cell in cells)
    return {
        "linear": linear,
        "weights": sum(cell.matrices for cell in cells),
        "patterns": _patterns(cells),
        "elements": elements,
        "sparsity": sum(cell.zeros for cell in cells) / elements,
        "median": statistics.median(errors) if errors else None,
        "worst": max((cell.worst for cell in cells if cell.worst is not None), default=None),
    }


def _patterns(cells: list[Cell]) -> str:
    """All of them, or between what sparsities many lie."""
    patterns = list(dict.fromkeys(pattern for cell in cells for pattern in cell.patterns))
    if len(patterns) <= 3:
        return ", ".join(patterns)
    least, most = (as_percent(pick(cell.sparsity for cell in cells)) for pick in (min, max))
    return f"{len(patterns)} patterns, {least} to {most} zeros"


def tuned_told(tuned: list[Mapping[str, Any]]) -> str:
    """What the tuning brought, in sentences."""
    told = [_distilled(row) for row in tuned if row["part"] == "model"]
    if parts := [row for row in tuned if row["part"] != "model"]:
        before, after = (as_figure(statistics.fmean(row[when] for row in parts), 3) for when in ("before", "after"))
        what = f"{len(parts)} parts of layers: their relative squared error on held-out windows"
        told.append(f"{what} goes from {before} to {after} on average.")
    return " ".join(told)


def _distilled(row: Mapping[str, Any]) -> str:
    change = f"{as_figure(row['before'], 3)} → {as_figure(row['after'], 3)} nats a token"
    return f"Distilled in {row['passes']} passes: {change} from the dense model, on held-out windows."


def time_told(document: Mapping[str, Any]) -> str:
    """The whole time, and the most memory by device."""
    peaks = [f"{as_bytes(size)} ({where})" for where, size in document.get("peak_memory_bytes", {}).items()]
    memory = f" Peak memory: {', '.join(peaks)}." if peaks else ""
    return f"{as_duration(sum(document.get('seconds', {}).values()))} in all.{memory}"


def source(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The model and the calibration text: what, and which."""
    origin, model = document["source"], document.get("model", {})
    yield "model", str(origin.get("id"))
    if origin.get("revision"):
        yield "revision", origin["revision"]
    if model:
        yield "architecture", f"{model['architecture']}, {model['layers']} layers"
    yield "parameters", f"{document['totals']['parameters']:,}"
    for key, held in origin.get("calibration", {}).items():
        yield ("calibration text" if key == "name" else key), as_setting(held)
