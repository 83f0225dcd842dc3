"""The tables of compare_methods: cells averaged over seeds, beside the dense model and a reference row."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from comparison_cells import Cell
from rich.console import Console
from rich.table import Table

from llmprune.eval.perplexity import Perplexity

__all__ = ["show", "windows_of"]

MIB = 2**20


def show(cells: Sequence[Cell], reference: str) -> None:
    """A table for each model, list of evaluation texts and calibration text, and what the numbers mean."""
    console = Console(highlight=False)
    for title, part in _tables(cells):
        console.print(_table(title, part, reference))
    console.print(*dict.fromkeys(result.protocol for cell in cells for result in cell.perplexities), sep="\n")
    console.print(
        "±: where a row has several seeds, the standard error of the mean over them, which are choices of calibration "
        "windows; else that of the evaluation, its windows taken as independent."
    )
    if any(cell.label == reference for cell in cells):
        console.print(
            f"removed: 1 − excess / excess of {reference}, where excess is log perplexity over the dense model's; "
            "compared seed by seed, ± standard error over seeds."
        )
    console.print(*dict.fromkeys(map(_machine, cells)), sep="\n")


def _tables(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Cells that can be compared, under a title. Those that looked at no text belong to every calibration text."""

    def exam(cell: Cell) -> tuple[Any, ...]:
        return cell.identity["model"], *cell.identity["evaluation"]

    def text(cell: Cell) -> str | None:
        return None if cell.calibration is None else cell.calibration["name"]

    for key in dict.fromkeys(map(exam, cells)):
        part = [cell for cell in cells if exam(cell) == key]
        for name in dict.fromkeys(text(cell) for cell in part if text(cell)) or [None]:
            title = part[0].model + (f", calibrated on {name}" if name else "")
            yield title, [cell for cell in part if text(cell) in (None, name)]


def _table(title: str, cells: Sequence[Cell], reference: str) -> Table:
    groups = _groups(cells)
    table = Table("row", "sparsity", "windows", title=title, title_justify="left")
    compared = any(cell.label == reference for cell in cells)
    for result in cells[0].perplexities:
        table.add_column(result.dataset)
        if compared:
            table.add_column("removed", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("MiB", justify="right")
    for before, group in zip([None, *groups], groups):
        if before is not None and before[0].sparsity != group[0].sparsity:
            table.add_section()
        dense = [cell for cell in cells if cell.sparsity is None]
        partners = () if group[0].label == reference else _partners(group[0], groups, reference)
        table.add_row(*_texts_of(group, _removed(group, partners, dense) if compared else None))
    return table


def _texts_of(group: Sequence[Cell], removed: Sequence[Sequence[float]] | None) -> Iterator[str]:
    """The cells of one row of the table."""
    first = group[0]
    yield from (first.label, first.sparsity or "", windows_of(first))
    for text, results in enumerate(zip(*(cell.perplexities for cell in group))):
        yield _mean(results)
        if removed is not None:
            yield _percent(removed[text])
    for values in ([cell.seconds for cell in group], [cell.memory and cell.memory / MIB for cell in group]):
        known = [value for value in values if value is not None]
        yield f"{statistics.fmean(known):,.1f}" if known else ""


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ in nothing but their seed, sorted so that what is to be compared stands together."""

    def key(cell: Cell) -> str:
        return json.dumps([cell.label, cell.identity["settings"], cell.num_samples, cell.seq_len])

    groups = [[cell for cell in cells if key(cell) == each] for each in dict.fromkeys(map(key, cells))]
    sparsities = list(dict.fromkeys([None, *(cell.sparsity for cell in cells)]))
    return sorted(groups, key=lambda group: (sparsities.index(group[0].sparsity), group[0].num_samples or 0))


def windows_of(cell: Cell) -> str:
    """Number and length of the calibration windows; empty for what was not calibrated."""
    return f"{cell.num_samples} × {cell.seq_len}" if cell.num_samples else ""


def _partners(cell: Cell, groups: Sequence[Sequence[Cell]], reference: str) -> Sequence[Cell]:
    """The cells of the reference that this one is compared with: of the same sparsity and number of windows."""
    same = [
        group
        for group in groups
        if group[0].label == reference
        and group[0].sparsity == cell.sparsity
        and (cell.num_samples is None or windows_of(group[0]) == windows_of(cell))
    ]
    return same[0] if len(same) == 1 else ()  # without a text of its own a row has no place on the reference's curve


def _removed(group: Sequence[Cell], reference: Sequence[Cell], dense: Sequence[Cell]) -> list[list[float]]:
    """For each text, and each seed that both have: which share of the reference's excess is not there any more."""
    texts = range(len(group[0].perplexities))
    if not dense:
        return [[] for _ in texts]
    pairs = [(one, other) for one in group for other in reference if one.seed in (None, other.seed)]
    excesses = [
        [(_excess(one, dense[0], text), _excess(other, dense[0], text)) for one, other in pairs] for text in texts
    ]
    return [[1 - one / other for one, other in each if other > 0] for each in excesses]


def _excess(cell: Cell, dense: Cell, text: int) -> float:
    return math.log(cell.perplexities[text].value / dense.perplexities[text].value)


def _mean(results: Sequence[Perplexity]) -> str:
    """Mean over seeds ± its standard error; a single value with the evaluation's own error."""
    if len(results) == 1:
        return str(results[0])
    values = [result.value for result in results]
    return f"{statistics.fmean(values):.4g} ± {_error(values):.2g}"


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    error = f" ± {100 * _error(shares):.2g}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.1f}{error} %"


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _machine(cell: Cell) -> str:
    used = cell.made["versions"]
    commit = f" ({used['commit']})" if used["commit"] else ""
    threads = f", {cell.made['threads']} threads" if used["device"] == "cpu" else ""
    tools = f"torch {used['torch']}, transformers {used['transformers']}"
    return f"llmprune {used['llmprune']}{commit}, {tools}; {used['device']}, {used['cpu']}{threads}."
