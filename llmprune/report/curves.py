"""What is drawn of several runs together."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from llmprune.report.drawing import as_svg, axes_at, sheet
from llmprune.report.facts import Grid
from llmprune.report.palette import RUNS, light

__all__ = ["error_curves"]


def error_curves(grids: Sequence[Grid], name: str, *, width: int) -> str:
    """Mean output error of the linears of each layer, a line for each run in the colour `run-0`, `run-1`, …"""
    with sheet(width, 280) as figure:
        axes = axes_at(figure, left=46, top=8, right=10, bottom=42)
        for index, grid in enumerate(grids):
            known = [(layer, error) for layer in grid.layers if (error := grid.error(layer)) is not None]
            axes.plot(
                [layer for layer, _ in known],
                [error for _, error in known],
                color=light(f"run-{index % RUNS}"),
                linestyle="--" if index >= RUNS else "-",
                linewidth=2,
                marker="o",
                markersize=4 if len(known) <= 40 else 0,
                clip_on=False,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.6, max(1, *(len(grid.layers) for grid in grids)) - 0.4)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(min(20, width // 40), integer=True))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        label = f"Lines of the mean output error by decoder layer, for {len(grids)} runs. The table below has them."
        return as_svg(figure, name, label=label)
