"""What is drawn of one run. Every function gives an `<svg>` of the width asked for, in pixels.

A page holds each plot twice, wide and narrow, and shows the one that fits: type that shrinks with the window cannot be
read on a phone. Numbers stand in tables behind the plots too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from llmprune.report.drawing import as_svg, axes_at, sheet
from llmprune.report.facts import Cell, Grid
from llmprune.report.measures import Measure, Value
from llmprune.report.palette import HEAT, heat, light

__all__ = ["NARROW", "WIDE", "error_map", "sparsity_bars", "stage_bars", "value_dots"]

WIDE, NARROW = 1000, 358
"""Widths in pixels: of the page's column, and of what a phone leaves of it."""

_LETTER = 6.9
"""Pixels of a letter, on average."""

_BESIDE: Any = {"xycoords": "axes fraction", "textcoords": "offset points"}
"""Where a note stands: so many pixels from a corner of the axes."""

_NUMBERED = 14
"""Up to so many layers there is room for a number in every cell."""


def error_map(grid: Grid, name: str, *, width: int) -> str:
    """Output error by layer and linear: layers from left to right, or on a narrow page from top to bottom."""
    top = grid.measured[0][0] if grid.measured else 1.0
    wide = width >= WIDE
    label_room = max((len(linear) for linear in grid.linears), default=0) * _LETTER + 12
    if wide:
        side = min((width - label_room - 4) / max(len(grid.layers), 1), 44.0)
        plot = (side * len(grid.layers), 24.0 * len(grid.linears))
        margins = {"left": label_room, "top": 22.0}
    else:
        side = min((width - 40) / max(len(grid.linears), 1), 44.0)
        plot = (side * len(grid.linears), max(10.0, 18.0 - len(grid.layers) / 8) * len(grid.layers))
        margins = {"left": 36.0, "top": label_room}
    height = margins["top"] + plot[1] + 44
    with sheet(width, height) as figure:
        axes = axes_at(figure, **margins, right=width - margins["left"] - plot[0], bottom=44)
        titles = _draw_cells(axes, grid, top, upright=not wide)
        _label_cells(axes, grid, upright=not wide)
        scale = axes_at(figure, left=margins["left"], top=height - 26, right=width - margins["left"] - 180, bottom=16)
        _draw_scale(scale, top)
        shown = f"{len(grid.measured)} errors from {grid.measured[-1][0]:.3f} to {top:.3f}" if grid.measured else "none"
        label = f"Heat map of the relative output error by decoder layer and linear: {shown}. The table below has them."
        return as_svg(figure, name, label=label, titles=titles)


def _draw_cells(axes: Axes, grid: Grid, top: float, *, upright: bool) -> dict[str, str]:
    """A rectangle for each matrix, and what to say of it by the rectangle's name."""
    titles: dict[str, str] = {}
    for row, linear in enumerate(grid.linears):
        for layer in grid.layers:
            where = (row, layer) if upright else (layer, row)
            named = f"c{len(titles)}"
            if (cell := grid.cells.get((layer, linear))) is not None:
                colour = None if cell.error is None else heat(cell.error / top if top else 0.0)
                _draw_cell(axes, where, colour, named)
                titles[named] = _told(cell)
                if cell.error is not None and len(grid.layers) <= _NUMBERED and not upright:
                    ink = light("paper" if cell.error > 0.42 * top else "ink")
                    axes.text(*where, f"{cell.error:.2f}", ha="center", va="center", fontsize=10, color=ink)
            elif (held := grid.dense.get((layer, linear))) is not None:
                _draw_cell(axes, where, None, named)
                titles[named] = f"layer {layer}, {linear}: left dense ({held.reason})"
    return titles


def _draw_cell(axes: Axes, where: tuple[int, int], colour: str | None, named: str) -> None:
    """Filled with a colour of the scale, or hollow."""
    x, y = where
    fill = "none" if colour is None else light(colour)
    edge = light("rule") if colour is None else light("paper")
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor=edge, linewidth=1, gid=named, clip_on=False)
    )


def _told(cell: Cell) -> str:
    parts = [
        f"layer {cell.layer}, {cell.linear}: error " + ("not measured" if cell.error is None else f"{cell.error:.4f}")
    ]
    if cell.matrices > 1:
        parts.append(f"mean of {cell.matrices} experts" + ("" if cell.worst is None else f", worst {cell.worst:.4f}"))
    parts.append(f"{cell.sparsity:.1%} zeros ({', '.join(cell.patterns)})")
    return "; ".join(parts)


def _label_cells(axes: Axes, grid: Grid, *, upright: bool) -> None:
    layers, linears = (axes.yaxis, axes.xaxis) if upright else (axes.xaxis, axes.yaxis)
    axes.set_xlim(-0.5, (len(grid.linears) if upright else max(len(grid.layers), 1)) - 0.5)
    axes.set_ylim((max(len(grid.layers), 1) if upright else len(grid.linears)) - 0.5, -0.5)
    linears.set_ticks(range(len(grid.linears)), grid.linears)
    axes.annotate("layer", (0, 1), (-6, 7), ha="right", color=light("muted"), **_BESIDE)
    step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100) if len(grid.layers) / step <= 40)
    shown = [layer for layer in grid.layers if layer % step == 0]
    layers.set_ticks(shown, [str(layer) for layer in shown])
    axes.xaxis.tick_top()
    if upright:
        axes.tick_params(axis="x", rotation=90)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_scale(axes: Axes, top: float) -> None:
    """The colours, from no error to the largest."""
    for step in range(HEAT):  # each to the end, so that no seam shows between two
        axes.add_patch(Rectangle((step, 0), HEAT - step, 1, facecolor=light(heat(step / HEAT)), edgecolor="none"))
    axes.set_xlim(0, HEAT)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, HEAT / 2, HEAT], ["0", f"{top / 2:#.2g}", f"{top:#.2g}"])
    axes.tick_params(axis="x", pad=3)
    axes.annotate("output error", (1, 0.5), (10, 0), va="center", color=light("muted"), **_BESIDE)
    for spine in axes.spines.values():
        spine.set_visible(False)


def sparsity_bars(grid: Grid, name: str, *, width: int) -> str:
    """Fraction of zeros in the matrices of each layer."""
    held = [(layer, share) for layer in grid.layers if (share := grid.sparsity(layer)) is not None]
    shares = [share for _, share in held]
    with sheet(width, 150) as figure:
        axes = axes_at(figure, left=46, top=8, right=6, bottom=40)
        layers = [layer for layer, _ in held]
        bars = axes.bar(layers, shares, width=0.8, color=light("faint"), clip_on=False)
        axes.hlines(
            shares, [at - 0.4 for at in layers], [at + 0.4 for at in layers], color=light("accent"), linewidth=2
        )
        titles = _titled(bars.patches, [f"layer {layer}: {share:.2%} zeros" for layer, share in held])
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_xlim(-0.6, max(len(grid.layers), 1) - 0.4)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(min(20, width // 40), integer=True))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        span = f"from {min(shares):.1%} to {max(shares):.1%}" if shares else "none"
        return as_svg(figure, name, label=f"Bars of the fraction of zeros by decoder layer, {span}.", titles=titles)


def stage_bars(seconds: Mapping[str, float], tell: Callable[[float], str], name: str, *, width: int) -> str:
    """Wall time of each stage, `tell` turning seconds into words."""
    room = max(map(len, seconds)) * _LETTER + 12
    with sheet(width, 24 * len(seconds) + 8) as figure:
        axes = axes_at(figure, left=room, top=4, right=86, bottom=4)
        places = range(len(seconds))
        bars = axes.barh(places, list(seconds.values()), height=0.5, color=light("accent"), clip_on=False)
        words = [tell(value) for value in seconds.values()]
        axes.bar_label(bars, labels=words, padding=6, color=light("ink"), fontsize=12)
        axes.set_yticks(places, list(seconds))
        axes.set_ylim(len(seconds) - 0.5, -0.5)
        axes.set_xlim(0, max(*seconds.values(), 1e-9))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        told = ", ".join(f"{stage} {word}" for stage, word in zip(seconds, words))
        return as_svg(figure, name, label=f"Bars of the wall time by stage: {told}.")


def value_dots(measures: Sequence[Measure], name: str, *, width: int) -> str:
    """Dense and pruned as dots with their standard errors, a row for each measure of one kind."""
    log = measures[0].kind == "perplexity"
    room = min(max(len(measure.subject) for measure in measures) * _LETTER + 14, 0.4 * width)
    with sheet(width, 40 * len(measures) + 46) as figure:
        axes = axes_at(figure, left=room, top=6, right=24, bottom=40)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=max(3, width // 60)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        for row, measure in enumerate(measures):
            _dot(axes, measure.dense, row, "muted", filled=False)
            if measure.pruned is not None:
                start, end = measure.dense.value, measure.pruned.value
                axes.plot([start, end], [row, row], color=light("faint"), linewidth=1, zorder=1)
                _dot(axes, measure.pruned, row, "accent", filled=True)
        axes.set_yticks(range(len(measures)), [_short(measure.subject, room) for measure in measures])
        axes.set_ylim(len(measures) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.set_xlabel("perplexity, logarithmic: lower is better" if log else "score: higher is better")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        told = "; ".join(_in_words(measure) for measure in measures)
        return as_svg(figure, name, label=f"Dots with standard errors: {told}.")


def _dot(axes: Axes, value: Value, row: float, colour: str, *, filled: bool) -> None:
    axes.errorbar(
        [value.value],
        [row],
        xerr=None if value.error is None else [[min(value.error, 0.99 * value.value)], [value.error]],
        fmt="o",
        markersize=8,
        markeredgewidth=1.6,
        markerfacecolor=light(colour if filled else "paper"),
        color=light(colour),
        elinewidth=1.6,
        capsize=4,
        clip_on=False,
        zorder=3,
    )


def _in_words(measure: Measure) -> str:
    pruned = "not measured" if measure.pruned is None else f"{measure.pruned.value:.4g}"
    return f"{measure.subject}, dense {measure.dense.value:.4g}, pruned {pruned}"


def _short(text: str, room: float) -> str:
    letters = int((room - 10) / _LETTER)
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _titled(shapes: Sequence[Rectangle], told: Sequence[str]) -> dict[str, str]:
    """Names for the shapes, and what to say of each."""
    titles = {f"b{index}": sentence for index, sentence in enumerate(told)}
    for shape, named in zip(shapes, titles):
        shape.set_gid(named)
    return titles
