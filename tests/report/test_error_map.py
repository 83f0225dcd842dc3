"""The heat map as a picture of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from llmprune.report.document import REPORT
from tests.report.documents import document


def test_the_script_makes_one_svg_that_brings_its_colours(repository: Path, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(json.dumps(document()))
    command = [sys.executable, repository / "scripts" / "error_map", tmp_path, tmp_path / "map.svg"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    picture = ElementTree.parse(tmp_path / "map.svg").getroot()
    style = next(picture.iter("{http://www.w3.org/2000/svg}style")).text or ""
    assert style.count("--heat-0:") == 2  # light and dark
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}title"))) == 7  # six weights and a router
