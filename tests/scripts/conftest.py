"""The scripts of the repository, imported as modules, and a tiny model with a text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from tests.builders import tiny_model, tiny_tokenizer

Script = Callable[[str], ModuleType]


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Import a file of scripts/ by name, with its neighbours in reach as when it is run."""
    monkeypatch.syspath_prepend(repository / "scripts")

    def load(name: str) -> ModuleType:
        loader = SourceFileLoader(Path(name).stem, str(repository / "scripts" / name))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, loader.name, module)  # dataclasses look their module up there
        loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return folder
