"""A plan on the screen: decisions, sizes, memory, time, and what it is good for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from llmprune.plan.overview import Forecast
from llmprune.results import PrunedWeight, SkippedWeight

__all__ = ["Line", "folded", "show_forecast"]

MEBIBYTE, SOME = 2**20, 12
"""SOME : so many different lines of skipped weights are shown before the rest is counted."""


@dataclass(frozen=True)
class Line:
    """Weights that differ in nothing but numbers in their names.

    name : with a star where the number was
    decision : the pattern, or "dense" and why
    zeros, dense, packed : of all together; bytes are None for what stays dense
    """

    name: str
    count: int
    shape: tuple[int, ...]
    decision: str
    zeros: int
    dense: int | None
    packed: int | None


def show_forecast(plan: Forecast, *, every: bool) -> None:
    """Print a plan to standard output; `every` weight by itself, or equal ones as one line."""
    console = Console(highlight=False)
    console.print(_weights(folded(plan.weights, plan.skipped, plan.sizes.weights, every=every), every=every))
    facts = Table.grid(padding=(0, 2))
    for name, value in (*_sizes(plan), *_memory(plan), *_time(plan)):
        facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(facts)
    programs = Table("in", "smaller or faster?")
    for program, sentence in plan.gains.items():
        programs.add_row(program, sentence)
    console.print(programs)
    for note in plan.notes:
        console.print(f"note: {note}", style="dim")


def folded(
    weights: Sequence[PrunedWeight],
    skipped: Sequence[SkippedWeight],
    bytes_of: dict[str, tuple[int, int]],
    *,
    every: bool = False,
) -> list[Line]:
    """A line for every weight, or for all that are alike: equal but for the numbers in their names."""
    lines = [Line(_short(row.name), 1, row.shape, row.pattern, row.zeros, *bytes_of[row.name]) for row in weights]
    lines += [Line(_short(row.name), 1, row.shape, f"dense: {row.reason}", 0, None, None) for row in skipped]
    if every:
        return lines
    groups: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault((_starred(line.name), line.shape, line.decision), []).append(line)
    return [_together(group) for group in groups.values()]


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _starred(name: str) -> str:
    return re.sub(r"(?<=[.\[])\d+(?=[.\]]|$)", "*", name)


def _together(lines: Sequence[Line]) -> Line:
    first = lines[0]
    if len(lines) == 1:
        return first
    return Line(
        _starred(first.name),
        len(lines),
        first.shape,
        first.decision,
        sum(line.zeros for line in lines),
        _sum(line.dense for line in lines),
        _sum(line.packed for line in lines),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def _weights(lines: Sequence[Line], *, every: bool) -> Table:
    table = Table(Column("weight", overflow="fold"), "×", "shape", "decision", "zeros", "MiB dense", "MiB packed")
    for column in (1, 4, 5, 6):
        table.columns[column].justify = "right"
    pruned = [line for line in lines if line.dense is not None]
    skipped = [line for line in lines if line.dense is None]
    shown = skipped if every else skipped[:SOME]
    for line in (*pruned, *shown):
        sizes = ("", "") if line.dense is None or line.packed is None else (_mib(line.dense), _mib(line.packed))
        shape = "×".join(map(str, line.shape))
        table.add_row(line.name, str(line.count), shape, line.decision, f"{line.zeros:,}", *sizes)
    if len(shown) < len(skipped):
        table.caption = f"and {len(skipped) - len(shown)} more lines of weights that stay dense: --all shows them"
    return table


def _sizes(plan: Forecast) -> Iterable[tuple[str, str]]:
    sizes = plan.sizes
    own = sum(row.shape[0] * row.shape[1] for row in plan.weights)
    yield (
        "pruned",
        f"{len(plan.weights):,} weights, {own / sizes.parameters:.1%} of all {sizes.parameters:,} parameters",
    )
    about = "" if plan.settled else "about "
    yield (
        "zeros",
        f"{about}{sizes.zeros:,}: {sizes.zeros / own:.2%} of these, {sizes.zeros / sizes.parameters:.2%} of all",
    )
    before = "" if sizes.before is None else f"now {_mib(sizes.before)} MiB; "
    packed = f"{_mib(sizes.packed)} MiB with --format packed ({sizes.packed / sizes.dense:.1%})"
    yield "files", f"{before}saved dense {_mib(sizes.dense)} MiB; {packed}"


def _memory(plan: Forecast) -> Iterable[tuple[str, str]]:
    memory = plan.memory
    apart = plan.device.type != "cpu"
    gpu = f" of the host, {_mib(memory.device_bytes)} MiB of {plan.device}" if apart else ""
    totals = {stage: sum(term.nbytes for term in terms) for stage, terms in memory.stages.items()}
    largest = max(totals, key=lambda stage: totals[stage])
    low = " (--low-memory)" if plan.low_memory else ""
    what = f"{_mib(memory.peak_bytes)} MiB{gpu}{low}, mapped files not counted; at most in stage “{largest}”:"
    yield "peak memory", what
    least = plan.least_memory
    if not plan.low_memory and least is not None:
        yield "", f"with --low-memory {_mib(least.peak_bytes)} MiB"
    for term in memory.stages[largest]:
        yield "", f"{_mib(term.nbytes):>8} MiB  {term.name}{f' ({plan.device})' if apart and term.on_device else ''}"


def _time(plan: Forecast) -> Iterable[tuple[str, str]]:
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in plan.duration.stages.items())
    yield "time", f"about {_duration(plan.duration.seconds)} on this machine as it is now (an estimate): {stages}"
    parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in plan.duration.parts.items())
    yield "", f"of “prune”: {parts}. Downloads and texts are not counted."


def _mib(size: float) -> str:
    return f"{size / MEBIBYTE:,.{0 if size >= 100 * MEBIBYTE else 1}f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60:02d} min"
    minutes, rest = divmod(rest, 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
