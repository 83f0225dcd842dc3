"""The colours of a page. Each has a name, which is a CSS variable, and two values: on light paper and on dark.

Plots are drawn in the light ones, and `drawing` puts the variables in their place. So no two light colours may be
equal.
"""

from __future__ import annotations

from matplotlib.colors import LinearSegmentedColormap, to_hex

__all__ = ["HEAT", "INK", "PALETTE", "RUNS", "css_variables", "heat", "light"]

INK = "ink"

RUNS = 8
"""How many runs have a colour of their own."""

HEAT = 24
"""Steps of the scale of the heat map."""

_NAMED = {
    INK: ("#1f2328", "#e3e6ea"),
    "muted": ("#5c6670", "#9aa4af"),
    "rule": ("#dfe3e8", "#2c333b"),
    "paper": ("#ffffff", "#14181d"),
    "panel": ("#f6f8fa", "#1b2026"),
    "accent": ("#2f5fc4", "#82aaff"),
    "faint": ("#c9d3e0", "#3b4653"),
    "run-0": ("#2f5fc5", "#82aafe"),
    "run-1": ("#bc4c00", "#f0883e"),
    "run-2": ("#0b7f6f", "#45c4b0"),
    "run-3": ("#8250df", "#bc8cff"),
    "run-4": ("#bf3989", "#f778ba"),
    "run-5": ("#7d6400", "#d8b43a"),
    "run-6": ("#57606a", "#aab4bf"),
    "run-7": ("#1a7f37", "#56d364"),
}

_SCALES = (
    LinearSegmentedColormap.from_list("light", ["#edf2f9", "#a9c3ec", "#4a7fd6", "#1f4aa0", "#10224f"]),
    LinearSegmentedColormap.from_list("dark", ["#1d2733", "#24477f", "#3f78d0", "#8db9ff", "#eaf2ff"]),
)


def _scale() -> dict[str, tuple[str, str]]:
    light, dark = _SCALES
    steps = [step / (HEAT - 1) for step in range(HEAT)]
    return {f"heat-{index}": (to_hex(light(step)), to_hex(dark(step))) for index, step in enumerate(steps)}


PALETTE: dict[str, tuple[str, str]] = {**_NAMED, **_scale()}
"""Name → (light, dark)."""


def light(name: str) -> str:
    """The colour of that name on light paper, as #rrggbb."""
    return PALETTE[name][0]


def heat(fraction: float) -> str:
    """The name of the colour at `fraction`, 0 to 1, of the heat map's scale."""
    return f"heat-{min(int(max(fraction, 0.0) * HEAT), HEAT - 1)}"


def css_variables(*, dark: bool) -> str:
    """The declarations of all colours."""
    return "".join(f"--{name}:{values[dark]};" for name, values in PALETTE.items())
