"""The modules behind scripts/gpu_check, tested without a GPU: all but the clock.

Kernels are their plain-torch twins, and time is made up.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

NAMES = (
    *("kernel_benchmarks", "gpu_rows", "gpu_clock", "gpu_candidates", "gpu_measure", "gpu_model", "gpu_table"),
    *("gpu_compile", "gpu_tests", "gpu_run", "gpu_weights"),
)


@pytest.fixture
def gpu(repository: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules behind scripts/gpu_check, by what follows `gpu_` in their names."""
    monkeypatch.syspath_prepend(repository / "scripts")
    return SimpleNamespace(**{name.removeprefix("gpu_"): importlib.import_module(name) for name in NAMES})
