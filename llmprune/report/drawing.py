"""Figures of matplotlib as SVG inside a page: its colours follow the page, light or dark, and so does its type.

matplotlib writes a whole document with fixed colours and a fixed font. What is kept of it are the shapes and texts;
each colour of the palette becomes a CSS variable, and shapes with a name (`gid`) get a title, which browsers show when
the pointer rests on them.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmprune.report.palette import PALETTE, light

__all__ = ["as_svg", "axes_at", "sheet"]

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_VARIABLES = {values[0]: f"var(--{name})" for name, values in PALETTE.items()}
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FAMILY = re.compile(r"font-family: [^;]+; |(?<=px) '[^;]+")

# In user units of the SVG, which are pixels of the page: at 72 dots an inch a point is one.
_SETTINGS: Any = {
    "figure.dpi": 72,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llmprune",  # the same figure gives the same file
    "text.parse_math": False,  # a name with dollar signs is no formula
    "font.family": "DejaVu Sans",  # comes with matplotlib; only for measuring
    "font.size": 12,
    "text.color": light("ink"),
    "axes.labelcolor": light("muted"),
    "axes.edgecolor": light("rule"),
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "grid.color": light("rule"),
    "grid.linewidth": 1,
    "axes.axisbelow": True,
    "xtick.color": light("rule"),
    "ytick.color": light("rule"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "axes.labelsize": 12,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.pad": 6,
}


@contextmanager
def sheet(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many pixels, and our settings for as long as it is drawn and written."""
    log = logging.getLogger("matplotlib")
    level = log.level
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts draw the text, not matplotlib's
        log.setLevel(logging.ERROR)  # it announces that it looks through the fonts for the first time
        try:
            yield Figure(figsize=(width / 72, height / 72))
        finally:
            log.setLevel(level)


def axes_at(figure: Figure, *, left: float, top: float, right: float, bottom: float) -> Axes:
    """Axes that leave margins of so many pixels."""
    width, height = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def as_svg(figure: Figure, name: str, *, label: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an `<svg>` element.

    name : unique in the page, for the ids in it
    label : what a screen reader says in its place
    titles : by `gid`
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for tag in ("metadata", "defs"):
        for child in root.findall(f"{{{_SVG}}}{tag}"):
            if tag == "metadata" or child.find(f"{{{_SVG}}}style") is not None:  # a style would hold for the whole page
                root.remove(child)
    for part in root.iter():
        _adopt(part, name, titles or {})
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-label": label}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    return ElementTree.tostring(root, encoding="unicode")


def _adopt(part: ElementTree.Element, name: str, titles: Mapping[str, str]) -> None:
    """One element: its style, its ids, its title."""
    for key in ("style", "fill", "stroke"):
        if key in part.attrib:
            styled = _FAMILY.sub("", part.attrib[key])  # the page's own font
            part.set(key, _COLOUR.sub(lambda found: _VARIABLES.get(found[0], found[0]), styled))
    for key in ("clip-path", f"{{{_LINK}}}href"):
        if key in part.attrib:
            part.set(key, part.attrib[key].replace("#", f"#{name}-"))
    if part.get("transform", "").startswith("rotate(-0 "):
        del part.attrib["transform"]
    if part.text is not None and not part.text.strip():
        part.text = None
    part.tail = "\n" if part.tag == f"{{{_SVG}}}path" else None
    if "id" not in part.attrib:
        return
    given = part.attrib.pop("id")
    if given in titles:
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = titles[given]
        part.insert(0, title)
    elif part.tag != f"{{{_SVG}}}g":  # groups are never referred to
        part.set("id", f"{name}-{given}")
