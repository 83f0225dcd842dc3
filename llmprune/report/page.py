"""One run as a page: `report.html`, a single file without scripts, which opens from disk and needs no network.

Everything that comes from a document is escaped by the template engine; only our own SVG goes in as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import llmprune
from llmprune.errors import UserError
from llmprune.report import plots, sentences
from llmprune.report.document import PAGE, Run, damage_told, read_run
from llmprune.report.facts import grid_of, model_name, note_counts, pattern_of, skipped_groups
from llmprune.report.measures import measures_of
from llmprune.report.palette import css_variables
from llmprune.report.words import as_count, as_duration, as_figure, as_percent, as_setting

__all__ = ["Drawn", "drawn", "fill", "page_trouble", "place", "run_page", "write_page"]


@dataclass(frozen=True)
class Drawn:
    """A plot in both widths: our own SVG, which the templates let in as it is."""

    wide: str
    narrow: str


def write_page(directory: Path) -> Path:
    """Draw the report in `directory` as `report.html` beside it, and return the page's path.

    Raises
    ------
    UserError
        if there is no report, it cannot be used, or the page cannot be written.
    """
    return place(run_page(read_run(directory)), directory / PAGE)


def page_trouble(directory: Path) -> str | None:
    """Draw the page as `write_page` does, for whom it is a by-product: what went wrong, in a sentence, or None.

    Then there is no page at all: an older one would tell of other files.
    """
    try:
        write_page(directory)
    except Exception as error:  # of matplotlib, fonts, templates, a full disk: no reason to lose the rest
        (directory / PAGE).unlink(missing_ok=True)
        what = " ".join(str(error).split()).rstrip(".") or "no reason given"
        return f"{PAGE} could not be drawn ({type(error).__name__}: {what}); `llmprune report DIR` tries again"
    return None


def place(page: str, path: Path) -> Path:
    """Write a page in one step, so that nobody opens half of one. Returns `path`; a UserError if that cannot be."""
    scratch = path.with_name(f".{path.name}")
    try:
        scratch.write_text(page, encoding="utf-8")
        return scratch.replace(path)
    except OSError as error:
        cure = "`llmprune report DIR --output FILE` puts it elsewhere"
        raise UserError(f"The page {path} cannot be written ({error.strerror}); {cure}.") from error


def run_page(run: Run) -> str:
    """The HTML of one run.

    Raises
    ------
    UserError
        if its report is damaged.
    """
    with damage_told(run):
        return fill("run.html.j2", **_context(run))


def fill(template: str, **context: Any) -> str:
    """A template of this room with what all pages need."""
    here = jinja2.PackageLoader("llmprune.report")
    engine = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters |= {"count": as_count, "figure": as_figure, "percent": as_percent}
    colours = {f"{paper}_colours": css_variables(dark=paper == "dark") for paper in ("light", "dark")}
    return engine.get_template(template).render(tool_version=llmprune.__version__, **colours, **context)


def drawn(draw: Callable[..., str], *arguments: Any, name: str) -> Drawn:
    """A plot in both widths, by a function of `plots` or `curves`. `name` is unique in the page."""
    wide, narrow = (
        draw(*arguments, f"{name}-{which}", width=width)
        for which, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))
    )
    return Drawn(wide, narrow)


def _context(run: Run) -> dict[str, Any]:
    document = run.document
    grid, measures = grid_of(document), measures_of(document)
    seconds = document.get("seconds", {})
    kinds = [[measure for measure in measures if measure.kind == kind] for kind in ("perplexity", "zero_shot")]
    name, pattern = model_name(document), pattern_of(document)
    return {
        "title": f"{name}, pruned to {pattern} · llmprune",
        "name": name,
        "pattern": pattern,
        "created": document.get("created", ""),
        "lede": " ".join(sentences.lede(document, measures)),
        "tiles": list(sentences.tiles(run, measures)),
        "measures": measures,
        "diverges": any(measure.divergence for measure in measures),
        "dots": [drawn(plots.value_dots, kind, name=f"dots-{kind[0].kind}") for kind in kinds if kind],
        "protocols": list(dict.fromkeys(protocol for measure in measures for protocol in measure.protocols)),
        "generations": [{**row, "told": sentences.sameness_told(row)} for row in document.get("generations", [])],
        "grid": grid,
        "error_map": drawn(plots.error_map, grid, name="errors") if grid.measured else None,
        "error_told": sentences.error_told(grid),
        "cell_told": lambda layer, linear: sentences.cell_told(grid, layer, linear),
        "sparsity_bars": drawn(plots.sparsity_bars, grid, name="sparsity") if grid.cells else None,
        "plan": [sentences.plan_row(grid, linear) for linear in grid.linears if grid.of_linear(linear)],
        "skipped": list(skipped_groups(document)),
        "tuned": document.get("tuned", []),
        "tuned_told": sentences.tuned_told(document.get("tuned", [])),
        "stage_bars": drawn(plots.stage_bars, seconds, as_duration, name="stages") if seconds else None,
        "time_told": sentences.time_told(document),
        "notes": document["notes"],
        "weight_notes": note_counts(document),
        "command": document["command"],
        "source": list(sentences.source(document)),
        "versions": list(document["versions"].items()),
        "settings": [(key, as_setting(held)) for key, held in document["config"].items() if held not in (None, [], "")],
    }
