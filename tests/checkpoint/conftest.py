"""A pruned checkpoint, and what it is packed to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmprune.checkpoint.convert import pack_checkpoint
from tests.checkpoint.packing import pruned_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_checkpoint(tmp_path_factory.mktemp("dense") / "out")


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    return pack_checkpoint(dense, dense.parent / "packed").directory


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A packed checkpoint to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))
