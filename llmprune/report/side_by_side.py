"""Several runs in one page: what each cost, what each kept, where their errors lie, and in which settings they differ.

Numbers stand in one column only if they were measured by one protocol. Runs of one model share its dense row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmprune.errors import UserError
from llmprune.report import curves, plots
from llmprune.report.document import Run, damage_told
from llmprune.report.facts import Grid, grid_of, mean_error, method_of, model_name, pattern_of
from llmprune.report.measures import Measure, Value, measures_of
from llmprune.report.page import Drawn, drawn, fill
from llmprune.report.palette import RUNS
from llmprune.report.words import as_bytes, as_duration, as_figure, as_percent, as_setting
from llmprune.results import told_apart

__all__ = ["COMPARISON", "comparison_page"]

COMPARISON = "comparison.html"

_MOST_RUNS = 2 * RUNS
"""A colour for each, first drawn through and then dashed: beyond that nobody tells them apart."""


@dataclass(frozen=True)
class _Told:
    """What the page tells of one run."""

    index: int
    label: str
    model: str
    grid: Grid
    measures: list[Measure]
    facts: dict[str, str]
    """Cells of the first table."""
    config: Mapping[str, Any]
    generations: Sequence[Mapping[str, str]]
    notes: Sequence[str]
    command: str


def comparison_page(runs: Sequence[Run]) -> str:
    """The HTML of several runs side by side.

    Raises
    ------
    UserError
        if a report is damaged, or there are more runs than can be told apart.
    """
    if len(runs) > _MOST_RUNS:
        raise UserError(f"a page compares at most {_MOST_RUNS} runs; got {len(runs)}: give fewer directories.")
    told = []
    for index, label in enumerate(told_apart([run.directory for run in runs])):
        with damage_told(runs[index]):
            told.append(_told(runs[index], index, label))
    return fill("comparison.html.j2", **_context(told))


def _told(run: Run, index: int, label: str) -> _Told:
    document, grid = run.document, grid_of(run.document)
    counts, seconds = document["totals"], document.get("seconds", {})
    facts = {
        "method": method_of(document),
        "pattern": pattern_of(document),
        "zeros": as_percent(counts["zeros"] / counts["parameters"]),
        "error": as_figure(mean_error(grid), 3),
        "size": "" if run.saved_bytes is None else as_bytes(run.saved_bytes),
        "pruning": as_duration(seconds["prune"]) if "prune" in seconds else "",
    }
    texts = [
        {key: row[key].strip() for key in ("prompt", "dense", "pruned")} for row in document.get("generations", ())
    ]
    return _Told(
        index=index,
        label=label,
        model=model_name(document),
        grid=grid,
        measures=measures_of(document),
        facts=facts,
        config=document["config"],
        generations=texts,
        notes=document["notes"],
        command=document["command"],
    )


def _context(told: list[_Told]) -> dict[str, Any]:
    models = list(dict.fromkeys(run.model for run in told))
    columns = list(dict.fromkeys(_column(measure) for run in told for measure in run.measures))
    what = f"{models[0]}, pruned in {len(told)} ways" if len(models) == 1 else f"{len(told)} pruned models"
    return {
        "title": f"{what} · llmprune",
        "name": what,
        "several_models": len(models) > 1,
        "runs": told,
        "columns": columns,
        "protocols": list(dict.fromkeys(column.protocol for column in columns)),
        "quality": [row for model in models for row in _quality([run for run in told if run.model == model], columns)],
        "diverges": any(measure.divergence for run in told for measure in run.measures),
        "dots": list(_dots(told, columns)),
        "curves": drawn(curves.error_curves, [run.grid for run in told], name="curves"),
        "deepest": max((run.grid for run in told), key=lambda grid: len(grid.layers)).layers,
        "differing": list(_differing([run.config for run in told])),
        "texts": list(_texts(told)),
        "notes": [(run.label, note) for run in told for note in run.notes],
        "mark": _mark,
    }


@dataclass(frozen=True)
class _Column:
    """What makes two numbers comparable."""

    kind: str
    subject: str
    metric: str
    protocol: str


def _column(measure: Measure) -> _Column:
    return _Column(measure.kind, measure.subject, measure.metric, measure.protocol)


def _mark(index: int) -> str:
    """The line of a run in the legend, as CSS."""
    return f"border-top-color: var(--run-{index % RUNS}); border-top-style: {'dashed' if index >= RUNS else 'solid'}"


def _quality(runs: list[_Told], columns: list[_Column]) -> Iterator[dict[str, Any]]:
    """The dense model's row, then a row for each of its runs."""
    found = [{_column(measure): measure for measure in run.measures} for run in runs]
    if not any(found):
        return
    dense: dict[_Column, Measure] = {}
    for measures in reversed(found):
        dense |= measures
    yield {
        "run": None,
        "label": f"{runs[0].model}, dense",
        "cells": [_cell(dense.get(column), pruned=False) for column in columns],
        "divergence": None,
    }
    for run, measures in zip(runs, found):
        divergences = [measure.divergence for measure in run.measures if measure.divergence is not None]
        yield {
            "run": run,
            "label": run.label,
            "cells": [_cell(measures.get(column), pruned=True) for column in columns],
            "divergence": divergences[0] if divergences else None,
        }


def _cell(measure: Measure | None, *, pruned: bool) -> dict[str, Any] | None:
    if measure is None:
        return None
    held: Value | None = measure.pruned if pruned else measure.dense
    return {"value": held, "percent": measure.is_share, "recovery": measure.recovery if pruned else None}


def _dots(told: list[_Told], columns: list[_Column]) -> Iterator[tuple[str, Drawn]]:
    """For each number that several runs have: what it is, and a row for each of them."""
    for index, column in enumerate(columns):
        found = [(run.label, measure) for run in told for measure in run.measures if _column(measure) == column]
        if len(found) > 1:
            rows = [replace(measure, subject=label) for label, measure in found]
            yield f"{column.subject}, {column.metric}", drawn(plots.value_dots, rows, name=f"dots-{index}")


def _differing(configs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """The settings that are not the same in all runs: name, and each run's."""
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [as_setting(config.get(name)) for config in configs]
        if len(set(values)) > 1:
            yield name, ["" if value == "None" else value for value in values]


def _texts(told: list[_Told]) -> Iterator[tuple[str, list[tuple[str, str, int | None]]]]:
    """Prompts, and what was written after each: by the dense models, then by the pruned ones, with the run's index."""
    written: dict[str, dict[str, tuple[str, int | None]]] = {}
    for run in told:
        for row in run.generations:
            written.setdefault(row["prompt"], {})[f"{run.model}, dense"] = (row["dense"], None)
    for run in told:
        for row in run.generations:
            written[row["prompt"]][run.label] = (row["pruned"], run.index)
    for prompt, texts in written.items():
        yield prompt, [(label, *text) for label, text in texts.items()]
