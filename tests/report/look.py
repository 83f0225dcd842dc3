"""Screenshots of reports, to look at: light and dark, wide and narrow.

    python -m tests.report.look DIR… --into FOLDER

A DIR is a pruned checkpoint; with several, the page that compares them is shown too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from llmprune.report.document import read_run
from llmprune.report.page import run_page
from llmprune.report.side_by_side import comparison_page
from tests.report.chromium import show

__all__ = ["main"]


def main() -> None:
    """Write the pages and their pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    given = parser.parse_args()
    given.into.mkdir(parents=True, exist_ok=True)
    for name, text in _pages(given.directories):
        page = given.into / f"{name}.html"
        page.write_text(text, encoding="utf-8")
        for dark in (False, True):
            for width in (1400, 390):
                picture = given.into / f"{name}-{'dark' if dark else 'light'}-{width}.png"
                show(page, width=width, dark=dark, folder=given.into, picture=picture)
                print(picture)


def _pages(directories: list[Path]) -> Iterator[tuple[str, str]]:
    runs = [read_run(directory) for directory in directories]
    for run in runs:
        yield run.directory.resolve().name, run_page(run)
    if len(runs) > 1:
        yield "comparison", comparison_page(runs)


if __name__ == "__main__":
    main()
