"""An action that waits for a module: fires once, whoever imports first, and leaves nothing behind."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprune.runtime.import_hook import when_imported

NAME = "awaited_module_of_this_test"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module on the path; afterwards nothing of it is left."""
    file = tmp_path / f"{NAME}.py"
    file.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield file
    sys.modules.pop(NAME, None)
    sys.meta_path[:] = finders


def waiting() -> int:
    return sum(type(finder).__module__ == "llmprune.runtime.import_hook" for finder in sys.meta_path)


def test_it_waits_for_the_import_and_leaves() -> None:
    before, seen = waiting(), []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    assert waiting() == before + 1
    assert not seen
    awaited = importlib.import_module(NAME)
    assert seen == [1]  # after the module's own code has run
    assert waiting() == before
    assert awaited.__spec__ is not None
    assert awaited.__loader__ is awaited.__spec__.loader
    assert not type(awaited.__loader__).__module__.startswith("llmprune")


def test_it_acts_at_once_if_the_module_is_loaded() -> None:
    importlib.import_module(NAME)
    before, seen = waiting(), []
    when_imported(NAME, lambda: seen.append(1))
    assert seen == [1]
    assert waiting() == before


def test_it_still_waits_after_an_import_that_failed(module: Path) -> None:
    before, seen = waiting(), []
    module.write_text("raise RuntimeError('not yet')\n")
    when_imported(NAME, lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(NAME)
    assert not seen
    module.write_text("value = 1  # longer, so that no cached bytecode is taken for it\n")
    importlib.import_module(NAME)
    assert seen == [1]
    assert waiting() == before


def test_asking_again_takes_the_place_of_the_first() -> None:
    seen: list[str] = []
    when_imported(NAME, lambda: seen.append("old"))
    when_imported(NAME, lambda: seen.append("new"))
    importlib.import_module(NAME)
    assert seen == ["new"]


def test_other_modules_pass_by(tmp_path: Path) -> None:
    (tmp_path / "another_module_of_this_test.py").write_text("value = 2\n")
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(1))
    assert importlib.import_module("another_module_of_this_test").value == 2
    assert not seen
    del sys.modules["another_module_of_this_test"]


def test_a_module_that_another_thread_is_loading(module: Path) -> None:
    """The action runs after the module is complete, and not never."""
    module.write_text("import time; time.sleep(0.2); value = 3\n")
    seen: list[int] = []
    thread = threading.Thread(target=importlib.import_module, args=(NAME,))
    thread.start()
    while NAME not in sys.modules:
        pass
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    thread.join()
    assert seen == [3]
