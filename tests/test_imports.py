"""Importing llmprune is cheap, touches no GPU, and shows exactly what it promises.

Each check runs in a fresh interpreter, because the test process itself has long since loaded torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llmprune

HEAVY = ("torch", "transformers", "datasets", "triton", "accelerate", "numpy")


def run(*arguments: str, cwd: Path) -> str:
    """Standard output of `python ARGUMENTS` in a folder that is no checkout; fails with its standard error."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"import sys, llmprune; print([name for name in {HEAVY} if name in sys.modules])"
    assert run("-c", code, cwd=tmp_path) == "[]"


def test_the_command_line_answers_without_torch(tmp_path: Path) -> None:
    code = f"import sys, llmprune.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert run("-c", code, cwd=tmp_path) == "[]"


def test_importing_all_public_names_leaves_the_gpu_alone(tmp_path: Path) -> None:
    code = (
        "import json, sys; before = set(globals())\n"
        "from llmprune import *\n"
        "shown = sorted(set(globals()) - before - {'before'})\n"
        "print(json.dumps([shown, callable(prune), sys.modules['torch'].cuda.is_initialized()]))"
    )
    shown, prune_is_a_function, gpu_in_use = json.loads(run("-c", code, cwd=tmp_path))
    assert shown == sorted(llmprune.__all__) == dir(llmprune)
    assert prune_is_a_function
    assert not gpu_in_use


def test_every_lazy_name_is_public_and_found_where_it_lives() -> None:
    assert set(llmprune._HOMES) <= set(llmprune.__all__)
    for name, home in llmprune._HOMES.items():
        assert getattr(llmprune, name).__module__ == home


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(llmprune, "prun")


def test_no_module_hides_a_public_name(repository: Path) -> None:
    """`llmprune.prune` is the function: a module `llmprune/prune.py` would take its place once imported."""
    modules = {path.stem for path in (repository / "llmprune").iterdir()} | {"eval"}
    assert not modules & set(llmprune.__all__)


def test_python_m_llmprune_is_the_command_line(tmp_path: Path) -> None:
    assert llmprune.__version__ in run("-m", "llmprune", "--version", cwd=tmp_path)
