"""`llmprune report DIR…`: the page drawn again, several runs in one page, or the JSON Schema of the report."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmprune.errors import UserError

__all__ = ["command"]

_DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(short_help="Draw the report of a pruned checkpoint as a page, or of several side by side.")
@click.argument("directories", metavar="DIR...", nargs=-1, type=_DIRECTORY)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the page goes.  [default: DIR/report.html; ./comparison.html for several]",
)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of llmprune_report.json, and do nothing else.")
def command(directories: tuple[Path, ...], output: Path | None, schema: bool) -> None:
    """Draw the llmprune_report.json of each DIR as one page that opens from disk, without network or scripts.

    With several DIRs the page shows the runs side by side: quality, errors by layer, and the settings that differ.
    """
    if schema:
        from llmprune.report.document import json_schema

        click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    if not directories:
        raise UserError("report needs the directory of a pruned checkpoint, or several: llmprune report DIR.")
    click.echo(_draw(directories, output))


def _draw(directories: tuple[Path, ...], output: Path | None) -> Path:
    from llmprune.report.document import PAGE, read_run
    from llmprune.report.page import place, run_page
    from llmprune.report.side_by_side import COMPARISON, comparison_page

    runs = [read_run(directory) for directory in directories]
    if len(runs) == 1:
        return place(run_page(runs[0]), output or directories[0] / PAGE)
    return place(comparison_page(runs), output or Path(COMPARISON))
