"""Several checkpoints of one model in one table, beside the dense one.

    python -m llmprune.eval.compare gpt2 ./gpt2-alps-2of4 ./gpt2-wanda-2of4 --tasks lambada

The first is the dense model; the others are what was made of it, by llmprune (packed ones too) or by others. They are
loaded one after the other. Whatever can be compared with the dense model is: see divergence.py for how.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmprune.eval.command import (
    check_early,
    measured_json,
    model_options,
    opened,
    progress,
    run_command,
    task_options,
    text_options,
    wanted_by,
)
from llmprune.eval.measure import Measured, Measures
from llmprune.eval.perplexity import CPU_TOKENS, Perplexity
from llmprune.eval.versions import versions
from llmprune.eval.zero_shot import ZeroShot
from llmprune.machine import device_named, give_back_memory
from llmprune.results import recovery, told_apart

__all__ = ["command", "main"]

CAPTION = (
    "Recovery, in brackets: of a perplexity dense / pruned, of an accuracy pruned / dense, × 100. "
    "± is the standard error over windows or items."
)


_NAME = 10
"""Characters in which a measure's name can be read, broken into lines."""


@dataclass(frozen=True)
class Column:
    """One model of the table, as it was named, and what was measured."""

    name: str
    measured: Measured


@click.command(
    help="Several checkpoints of one model in one table: perplexity, KL divergence and top-1 agreement with the dense "
    "one, zero-shot tasks, and how much of the dense model is left. DENSE and the others are hub ids, folders (packed "
    "ones too) or GGUF files."
)
@click.argument("dense")
@click.argument("others", metavar="CHECKPOINT...", nargs=-1, required=True)
@text_options
@task_options
@model_options
def command(*, dense: str, others: tuple[str, ...], as_json: bool, **options: Any) -> None:
    how = {name: options.pop(name) for name in ("dtype", "device", "trust_remote_code")}
    check_early((dense, *others), how=how, options=options)
    options["tokens"] = _tokens(options, device=how["device"])
    click.echo(f"dense: {dense}", err=True)
    loaded = opened(dense, **how)
    measures = Measures(wanted_by(loaded, **options), progress())
    found = [Column(dense, measures.dense(loaded.model, loaded.tokenizer))]
    for name in others:
        del loaded  # one model in memory at a time
        gc.collect()
        give_back_memory()
        click.echo(f"beside it: {name}", err=True)
        loaded = opened(name, **how)
        found.append(Column(name, measures.against(loaded.model, loaded.tokenizer)))
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2))
    else:
        _show(found)


def _tokens(options: dict[str, Any], *, device: str | None) -> int | None:
    """As many as asked for; else all of them on a GPU, and on a CPU what is done in minutes."""
    tokens: int | None = options["tokens"]
    if tokens is None and device_named(device).type == "cpu" and not options["no_perplexity"]:
        tokens = max(CPU_TOKENS, options["seq_len"] or 0)
        click.echo(f"On a CPU, the first {tokens:,} tokens of each data set are measured (--tokens).", err=True)
    return tokens


def _as_json(found: Sequence[Column]) -> dict[str, Any]:
    models = [measured_json(column.name, column.measured, found[0].measured) for column in found]
    return {"schema": 1, "versions": versions(), "models": models}


def _show(found: Sequence[Column]) -> None:
    """The table, what it means, and the generations, on standard output."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_table(found, console.width))
    # On a terminal lines end between words; in a file they go on.
    options: Any = {"soft_wrap": not console.is_terminal, "markup": False}
    console.print(CAPTION, style="dim", **options)
    for protocol in _protocols(found):
        console.print(protocol, style="dim", **options)
    for column in found:
        for note in column.measured.notes:
            console.print(f"note: {column.name}: {note}", **options)
    _show_generations(console, found, options)


def _table(found: Sequence[Column], width: int) -> Table:
    """A column for each model. Where so many characters are not enough, a number is the last thing that is broken."""
    rows = list(_rows(found))
    if _taken(rows) > width:
        rows = [[cell.replace(" (", "\n(") for cell in row] for row in rows]
    names, *widths = _widths(rows)
    fits = _taken(rows) - names + _NAME <= width
    table = Table("")
    titles = told_apart([column.name for column in found])
    for title, characters in zip(titles, widths, strict=True):
        table.add_column(escape(title), min_width=characters if fits else None)
    for row in rows:
        table.add_row(*row)
    return table


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The longest line of each column."""
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]


def _taken(rows: Sequence[Sequence[str]]) -> int:
    """The characters that a table takes, with a border and a blank at either side of each column."""
    return sum(width + 3 for width in _widths(rows)) + 1


def _protocols(found: Sequence[Column]) -> list[str]:
    """How everything was measured, each sentence once."""
    rows = [row for column in found for row in column.measured.rows]
    far = [row.divergence for row in rows if isinstance(row, Perplexity) and row.divergence is not None]
    return list(dict.fromkeys(each.protocol for each in [*rows, *far]))


def _rows(found: Sequence[Column]) -> Iterator[list[str]]:
    """The lines of the table: each measure's name and a cell for every model."""
    shares: list[list[float]] = [[] for _ in found]
    for index, first in enumerate(found[0].measured.rows):
        rows = [column.measured.rows[index] for column in found]
        left = [recovery(vars(first), vars(row)) for row in rows]
        for share, one in zip(shares, left, strict=True):
            share += [] if one is None else [one]
        yield [_title(first), str(first), *map(_cell, rows[1:], left[1:])]
        if isinstance(first, Perplexity):
            far = [row.divergence for row in rows if isinstance(row, Perplexity)]
            yield ["  KL, nats a token", *["" if each is None else each.kl_text for each in far]]
            yield ["  top-1 agreement", *["" if each is None else each.top1_text for each in far]]
    if len(found[0].measured.rows) > 1:
        yield ["mean recovery", *[f"{statistics.fmean(share):.1f} %" if share else "" for share in shares]]


def _title(row: Perplexity | ZeroShot) -> str:
    return f"perplexity on {escape(row.dataset)}" if isinstance(row, Perplexity) else f"{row.task} {row.metric}"


def _cell(row: Perplexity | ZeroShot, left: float | None) -> str:
    return str(row) if left is None else f"{row} ({left:.1f} %)"


def _show_generations(console: Console, found: Sequence[Column], options: dict[str, Any]) -> None:
    for index, first in enumerate(found[1].measured.generations):
        console.print(f"\nprompt: {first.prompt!r}", style="bold", **options)
        texts = [first.dense, *[column.measured.generations[index].pruned for column in found[1:]]]
        for title, text in zip(told_apart([column.name for column in found]), texts, strict=True):
            console.print(f"{title}: {text!r}", **options)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this file: exit code 2 and one sentence where something given cannot be used."""
    run_command(command, argv, "python -m llmprune.eval.compare")


if __name__ == "__main__":
    main()
