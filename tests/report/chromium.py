"""A page as a browser shows it: headless Chromium, light or dark, as wide as asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Shown", "find_chromium", "show"]

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")

# Asked in the page itself: does anything stick out of the window, and what colours does the reader see?
_ASK = """<script>addEventListener('load', () => {
  const root = document.documentElement, wide = [...document.querySelectorAll('body *')].filter(one =>
    one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll') && !one.closest('svg'));
  const seen = [...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().width > 0);
  root.dataset.answer = JSON.stringify({
    width: innerWidth, overflow: root.scrollWidth - innerWidth, sticking: wide.map(one => one.outerHTML.slice(0, 80)),
    paper: getComputedStyle(root).backgroundColor, ink: getComputedStyle(document.querySelector('h1')).color,
    plots: seen.length, smallest: Math.min(...seen.flatMap(one => [...one.querySelectorAll('text')].map(word =>
      parseFloat(getComputedStyle(word).fontSize) * one.getBoundingClientRect().width / one.viewBox.baseVal.width)))});
})</script>"""


@dataclass(frozen=True)
class Shown:
    """What the browser said of a page.

    answer : as the script above asks
    console : everything that it printed to the console
    """

    answer: dict[str, Any]
    console: list[str]


def find_chromium() -> str | None:
    """The path of a Chromium that can run headless, if this machine has one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def show(page: Path, *, width: int, dark: bool, folder: Path, picture: Path | None = None) -> Shown:
    """Open a page and ask it how it looks. `folder` takes a copy with the question; `picture` a screenshot.

    The page itself allows no script: only the copy does.
    """
    browser = find_chromium()
    assert browser is not None
    copy = folder / f"asked-{page.name}"
    text = page.read_text(encoding="utf-8").replace("default-src 'none'", "script-src 'unsafe-inline'")
    copy.write_text(text.replace("</body>", f"{_ASK}</body>"), encoding="utf-8")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"),
        f"--window-size={width},{9000 if width < 800 else 5000}",
        *((f"--screenshot={picture}",) if picture is not None else ("--dump-dom",)),
    ]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = re.search(r'data-answer="([^"]*)"', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(json.loads(answer[1].replace("&quot;", '"')) if answer else {}, console)
