"""The pages in a real browser: light and dark, narrow and wide, without a word on the console.

To look at them: `python -m tests.report.look DIR…` takes screenshots.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprune.report.document import Run
from llmprune.report.page import run_page
from llmprune.report.side_by_side import comparison_page
from tests.report.chromium import find_chromium, show
from tests.report.documents import document, pruned_row

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium: apt-get install chromium")

LIGHT_PAPER, DARK_PAPER = "rgb(255, 255, 255)", "rgb(20, 24, 29)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a deep model with long names, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    held = document(layers=48)
    held["pruned"] += [pruned_row(layer, "mlp.experts.gate_up_proj", 0.2, e) for layer in range(48) for e in range(2)]
    held["model"]["name"] = "a-name-without-any-blank-to-break-the-line-at-" * 3
    held["before"][0]["dataset"] = held["command"] = "x" * 120
    (folder / "run.html").write_text(run_page(Run(folder, held, 10**9)), encoding="utf-8")
    runs = [Run(folder / f"a-rather-long-name-of-a-directory-{index}", held, None) for index in range(5)]
    (folder / "several.html").write_text(comparison_page(runs), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "plots"), [("run.html", 5), ("several.html", 3)])
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1400, False)])
def test_it_fits_and_says_nothing_on_the_console(pages: Path, name: str, plots: int, width: int, dark: bool) -> None:
    shown = show(pages / name, width=width, dark=dark, folder=pages)
    assert shown.console == []
    assert shown.answer["width"] == width
    assert shown.answer["sticking"] == []
    assert shown.answer["overflow"] <= 0
    assert shown.answer["plots"] == plots  # each in the one width that fits
    assert shown.answer["smallest"] >= 9.5  # pixels: type in plots stays legible
    assert shown.answer["paper"] == (DARK_PAPER if dark else LIGHT_PAPER)
    assert shown.answer["ink"] != shown.answer["paper"]
