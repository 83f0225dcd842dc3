"""What all tests share: no internet, no GPU or shared data taken for granted, and the repository as data.

Settings that Hugging Face's libraries read at import are made here, before any test imports them. Tests that want a
Hub start one on the loopback and give its address to a subprocess.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# tokenizers warns when a process that used its threads is forked; tiny texts need no threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason in the summary; files with slow tests come first.

    Two processes share the files: a slow one at the end would leave one of them idle.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch  # only here: most single test files do not need it

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")
    if os.environ.get("LLMPRUNE_NETWORK") != "1":
        _skip(items, "network", "needs the internet; set LLMPRUNE_NETWORK=1")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """`caplog`, which also sees what transformers says: its logger passes nothing on unless it runs in a CI."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data sets that are too large, or not ours to ship (LLMPRUNE_SHARED)."""
    folder = os.environ.get("LLMPRUNE_SHARED")
    if not folder:
        pytest.skip("needs the folder that LLMPRUNE_SHARED names")
    path = Path(folder)
    assert path.is_dir(), f"LLMPRUNE_SHARED names {folder}, which is no folder"
    return path
