"""scripts/gpu_check itself: its folder, the tests that it runs, and a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


def _launcher(repository: Path) -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(repository / "scripts" / "gpu_check"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_checkout_that_is_not_installed_can_be_imported_and_tested(
    gpu: SimpleNamespace, repository: Path, tmp_path: Path
) -> None:
    _launcher(repository).link_checkout(repository, tmp_path)
    code = "import llmprune.eval, llmprune.triton_kernels as t; print(llmprune.__file__, t.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        str(tmp_path / "llmprune" / "__init__.py"),
        str(tmp_path / "llmprune" / "triton_kernels" / "__init__.py"),
    ]
    assert (tmp_path / "tests" / "gpu_check" / "test_command.py").is_file()
    names = gpu.tests.chosen_tests(tmp_path, ["-k", "single_weights"])
    assert {name.partition("[")[0] for name in names} == {
        f"tests/triton/test_{which}_gpu.py::test_single_weights_land_in_their_places"
        for which in ("matmul_24", "unstructured")
    }


def test_failing_tests_are_told(gpu: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    marked = "import pytest\n@pytest.mark.gpu\ndef test_{}():\n    assert {}\n"
    (folder / "test_one.py").write_text(marked.format("right", "True"))
    (folder / "test_two.py").write_text(marked.format("wrong", "3 == 4"))
    (folder / "test_cpu.py").write_text("def test_other():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    found = gpu.tests.run_tests(tmp_path, 60)
    assert not found["passed"]
    assert found["summary"].startswith("1 of 2 tests passed")
    assert "assert 3 == 4" in found["output"]
    assert "stopped: no time was left" in gpu.tests.run_tests(tmp_path, 0)["output"]
    assert not gpu.tests.run_tests(tmp_path, 60, ["-k", "no_such_test"])["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(repository: Path) -> None:
    command = [sys.executable, repository / "scripts" / "gpu_check", "--only", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "gpu_check needs a CUDA device, and torch sees none."
